"""Where a run's checkpoints are kept: in its own folder, or elsewhere, with copies of what else the folder holds.

A copy is whole or not there: a model's description goes last, metrics go before the checkpoint that they reach up to.
A fresh machine fetches them and goes on.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.diffusion.models.checkpoint import MODEL_FILE, WEIGHTS_FILE
from limbeck.storage_schemas.locks import only_one
from limbeck.storage_schemas.store import Store
from limbeck.trainer.runs.checkpoints import FOLDER, remove_folder
from limbeck.trainer.runs.claim import Claim

RECORD, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"
MODEL, BEST, STAGES = "model", "best", "stages"


class Place:
    """`folder`, the run's own, and `store`, which holds its checkpoints: the same, or the one at `uri`."""

    def __init__(self, folder: Path, uri: str | None) -> None:
        self.folder, own = folder, Store(str(folder))
        self.store = Store(uri) if uri is not None else own
        self.elsewhere = self.store.uri != own.uri
        self._claim: Claim | None = None

    @contextmanager
    def held(self, *, patience: float = 0.0) -> Iterator[None]:
        """Refuse a second fit in the place, as one in the same folder is refused, by a UsageError in one line.

        patience: seconds to wait for another to end. One that was killed keeps nobody out for more than a minute.
        """
        local = self.store.local_path(LOCK)
        if local and self.elsewhere:
            problem = f"another fit keeps its checkpoints in {self.store.uri}"
            refused = f"{problem}; wait for it, or choose another --checkpoints"
            with only_one(Path(local), refused=refused, patience=patience):
                yield
        elif self.elsewhere:
            with Claim(self.store) as self._claim:
                yield
        else:
            yield

    def check(self) -> None:
        """TakenOver where another fit goes on in the place, since this one was away for too long."""
        if self._claim:
            self._claim.check()

    def put(self, name: str) -> None:
        """Copy a file of the folder, or a model's folder; what another fit has taken over is left to it."""
        if not self.elsewhere:
            return
        self.check()
        names = [name]
        if (self.folder / name).is_dir():
            names = [f"{name}/{file}" for file in (WEIGHTS_FILE, MODEL_FILE)]
        for path in names:
            self.store.write(path, (self.folder / path).read_bytes())

    def fetch(self) -> None:
        """Fetch the copies into the folder. A finished stage's whole model stays there; what changes is replaced."""
        if not self.elsewhere:
            return
        self._fetch(METRICS)
        for name in (MODEL, BEST, *(f"{STAGES}/{stage}" for stage in self.store.list(STAGES))):
            if name == BEST or not (self.folder / name / MODEL_FILE).is_file():
                for file in (WEIGHTS_FILE, MODEL_FILE):
                    self._fetch(f"{name}/{file}")

    def clear(self) -> None:
        """Remove what a run writes, and nothing else, its record last; what holds no run is left as it is."""
        if self.elsewhere and self.store.exists(RECORD):
            for name in (*self._folders(), METRICS, RECORD):
                remove_folder(self.store, name)
                self.store.remove(name)
        if (self.folder / RECORD).is_file():
            for name in (FOLDER, "tensorboard", MODEL, BEST, STAGES):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in (METRICS, RECORD):
                (self.folder / name).unlink(missing_ok=True)

    def _folders(self) -> list[str]:
        """Folders of copies, inner ones first."""
        inner = [f"{name}/{one}" for name in (FOLDER, STAGES) for one in self.store.list(name)]
        return [*inner, FOLDER, STAGES, MODEL, BEST]

    def _fetch(self, name: str) -> None:
        data = self.store.read(name)
        if data is not None:
            write_whole(self.folder / name, data)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none where there is no file. What is no line of ours is left out.

    A kill may leave half a line, another program anything: neither keeps a run from going on.
    """
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        found = [_line_of(line) for line in file if line.endswith(b"\n")]
    return [line for line in found if line is not None]


def _line_of(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return (
        line
        if all(type(value) in ((str,) if name == "stage" else (int, float)) for name, value in line.items())
        else None
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file: readers and a kill see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
