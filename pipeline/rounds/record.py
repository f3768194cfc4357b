"""OUT/progressive.json: what was asked for, and how far it has come, for the run that goes on."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from limbeck.pipeline.rounds.config import ProgressiveConfig
from limbeck.storage_schemas.backends import read, write_local
from limbeck.storage_schemas.documents import MOST_BYTES, Document
from limbeck.storage_schemas.errors import UsageError, without_credentials
from limbeck.storage_schemas.locks import only_one
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.names import Count, DatasetName, Positive, Seconds, Sha256, Text

RECORD, LOCK = "progressive.json", ".progressive.lock"

FREE = {
    *("runner", "workers", "threads", "device", "ray", "max_attempts", "straggler_seconds", "drain_seconds"),
    *("max_quarantined", "ignore"),
    *("single_writer", "recheck", "max_missing", "as_json", "out", "launch", "dashboard", "compare_direct", "dataset"),
}
"""Fields that may differ when the same work goes on: where and how, not what."""

FREE_TO_FIT = {
    *("device", "threads", "micro-batch", "parallel", "checkpoint-every", "checkpoints", "keep-last", "log-every"),
    *("cache-folder", "cache-gib", "in-flight-mib", "ahead-mib", "verify", "gradient-checkpointing"),
}

OPEN = ("holdout", "format", "compression", "samples_per_shard", "micro_batch")
"""Fields that follow from what is there where they aren't given: each dataset goes on as it began."""

PATIENCE = 60.0
"""Seconds that a run waits for a trainer whose driver died: it saves, and ends."""


def only_run(folder: Path, *, patience: float = PATIENCE) -> AbstractContextManager[int]:
    """A lock's descriptor, which a trainer inherits: the folder is free when both have ended, else UsageError."""
    return only_one(
        folder / LOCK,
        refused=f"{folder}: another run is still at work there; wait for it, or choose another --out",
        patience=patience,
        wait=lambda: log.info(f"{folder}: another run, or the trainer of one that died, is at work: waiting"),
    )


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
class Facts(TypedDict, total=False):
    """What is known of a round, of the reference or of direct distillation, as far as it has come."""

    dataset: DatasetName
    manifest: Positive
    recipe: Sha256
    teacher: Sha256
    calls: Count
    solve_seconds: Seconds
    fit_seconds: Seconds
    student: Sha256 | None
    error: float | None
    teacher_error: float | None
    variance: float | None
    errors: dict[Text, float | None]


class Written(Document):
    """The document as it is read."""

    out: Text
    settings: dict[str, Any]
    reference: Facts
    rounds: dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")], Facts]
    direct: Facts


class Record:
    """The document, written whole at every change.

    rounds: by the steps of their students. A round has `student` once its fit is done, and `error` once it is measured.
    out: the folder as it was given, which recipes of later rounds name.
    """

    def __init__(self, config: ProgressiveConfig) -> None:
        self._path = config.out / RECORD
        now = {"out": str(config.out), "settings": settings(config)}
        self.plain: dict[str, Any] = {**now, "reference": {}, "rounds": {}, "direct": {}}
        there = _read(self._path)
        if there and there["rounds"]:  # before that nothing hangs on what was asked
            _check_goes_on(there, now, config)
            self.plain = there | now

    def round(self, steps: int) -> dict[str, Any]:
        """What is known of a round."""
        found: dict[str, Any] = self.plain["rounds"].get(str(steps), {})
        return found

    def note(self, part: str, **facts: Any) -> None:
        """Add to `reference` or `direct`."""
        self.plain[part] |= facts
        self._save()

    def note_round(self, steps: int, **facts: Any) -> None:
        """Add to a round."""
        self.plain["rounds"][str(steps)] = self.round(steps) | facts
        self._save()

    def _save(self) -> None:
        write_local(self._path, (json.dumps(self.plain, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return Written.from_bytes(read(None, "file", str(path), MOST_BYTES), str(path)).plain()


def settings(config: ProgressiveConfig) -> dict[str, Any]:
    """What identifies the work, as JSON."""
    options = {name: " ".join(values) for name, values in config.fit_options.items() if name not in FREE_TO_FIT}
    plain = config.model_dump(mode="json", exclude=FREE | {"fit"}) | {"fit": options, "steps": config.num_steps}
    return plain | {"store": without_credentials(config.store)}


def _check_goes_on(there: dict[str, Any], now: dict[str, Any], config: ProgressiveConfig) -> None:
    before, promoted = there["settings"], [part for part in there["rounds"].values() if "student" in part]
    if not promoted:  # the trainer itself knows which of its options a fit under way allows to change
        before = before | {"fit": now["settings"]["fit"]}
    asked = now["settings"]
    by_default = {name for name in OPEN if None in (before.get(name), asked.get(name))}
    before, asked = ({name: it[name] for name in it.keys() - by_default} for it in (before, asked))
    _check_same(before, asked, config.out)
    if there["out"] != now["out"] and len(promoted) < len(config.schedule):
        problem = f"{now['out']} was {there['out']} when its rounds began, and their recipes name it so"
        raise UsageError(f"{problem}: run it in the same folder with --out {there['out']}")


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path, prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        there, here = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            _check_same(there, here, out, f"{prefix}{name}.")
        elif there != here:
            was, asked = ("unset" if value is None else value for value in (there, here))
            raise UsageError(f"{out} holds rounds with {prefix}{name} {was}, not {asked}: choose another --out")
