"""A run's folder: what it is (run.json), and whether a new call goes on with it."""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_schemas.errors import UsageError, without_credentials
from trainer.config import FitConfig

_FILE, _LOCK = "run.json", ".lock"
# Where and how often, not what: these may differ when a run goes on.
_FREE = {
    "out", "threads", "device", "checkpoint_every", "keep_last", "resume", "log_every", "validate_every",
    "cache_mib", "ahead_mib", "save_dtype",
}  # fmt: skip
_OURS = (_FILE, "metrics.jsonl", "checkpoints", "tensorboard", "model", "stages")


@contextmanager
def only_fit(folder: Path) -> Iterator[None]:
    """Refuse a second fit in the same folder. The lock is the process's: a killed one leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another fit is at work in {folder}; wait for it, or choose another --out") from None
        yield


@dataclass(frozen=True)
class RunRecord:
    """run.json: a name of its own, the config, what it reads, and what its student is."""

    name: str
    config: dict[str, Any]
    reads: dict[str, Any]
    model: dict[str, Any]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(self.__dict__, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, folder / _FILE)


def earlier_run(config: FitConfig) -> RunRecord | None:
    """The run that `config` goes on with, None where it starts. A folder of another run is refused."""
    path = config.out / _FILE
    if not path.is_file() or not config.resume:
        return None
    record = RunRecord(**json.loads(path.read_text()))
    _check_same(record.config, plain(config), config.out)
    return record


def new_record(config: FitConfig, reads: dict[str, Any], model: dict[str, Any]) -> RunRecord:
    """The record of a run that starts now; in the folder of one before, by its name, so that it takes over the pin."""
    path = config.out / _FILE
    before = json.loads(path.read_text())["name"] if path.is_file() else None
    return RunRecord(before or f"{config.out.name}-{secrets.token_hex(4)}", plain(config), reads, model)


def plain(config: FitConfig) -> dict[str, Any]:
    """What identifies a run, as JSON. Credentials in the store's uri are no part of it."""
    settings = config.model_dump(mode="json", exclude=_FREE)
    return settings | {"data": settings["data"] and without_credentials(settings["data"])}


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path, prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        there, here = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            _check_same(there, here, out, f"{prefix}{name}.")
        elif there != here:
            told = f"{out} holds a run with {prefix}{name} {there}, not {here}"
            raise UsageError(f"{told}; choose another --out, or start it anew with --no-resume")


def clear(folder: Path) -> None:
    """Remove what a run writes, and nothing else; a folder that holds no run is left as it is."""
    if not (folder / _FILE).is_file():
        return
    for name in _OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
