"""A run's record, run.json, and whether a new call goes on with it."""

import json
import secrets
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from limbeck.diffusion.models.description import LONGEST
from limbeck.storage_schemas.command_line import ungrouped
from limbeck.storage_schemas.errors import UsageError, without_credentials
from limbeck.storage_schemas.locks import only_one
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.reading.options import StoreConfig
from limbeck.trainer.runs.place import LOCK, RECORD, Place, write_whole

_NAME = r"^[^/\\\x00-\x1f\x7f]+\z"  # which names pins, too
# Where, how and how often, not what: these may differ when a run goes on. That `data` is still the same samples, maybe
# in another place or format, is known by their digest, as the teacher's weights are.
_FREE: dict[str, Any] = dict.fromkeys((
    "out", "data", "dataset", "manifest", "follow_latest",
    "threads", "device", "parallel", "micro_batch", "gradient_checkpointing",
    "checkpoint_every", "checkpoints", "keep_last", "keep_best", "resume", "log_every", "validate_every", "save_dtype",
    "verify", "on_corrupt", "cache_folder", "cache_gib", "in_flight_mib", "ahead_mib",
), True) | {"teacher": {"uri": True, "offload": True}}  # fmt: skip


def only_fit(folder: Path, *, patience: float = 0.0) -> AbstractContextManager[int]:
    """Refuse a second fit in the same folder.

    patience: seconds to wait for another to end, for a restarted run whose processes elsewhere may be ending yet.
    """
    refused = f"another fit is at work in {folder}; wait for it, or choose another --out"
    return only_one(folder / LOCK, refused=refused, patience=patience)


@dataclass(frozen=True)
class RunRecord:
    """run.json: a name of its own, the config, what it reads first, and what its student is.

    place: where its checkpoints are, None for the folder itself. init: the saved model that it starts from, if it does.
    """

    name: Annotated[str, Field(pattern=_NAME, max_length=255)]
    config: dict[str, Any]
    reads: dict[str, Any]
    model: dict[str, Any]
    place: str | None
    init: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        write_whole(folder / RECORD, (json.dumps(self.__dict__, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def from_bytes(cls, data: bytes | None, source: str) -> "RunRecord | None":
        """None for None. Raises UsageError for what is no record of this release's."""
        if data is None:
            return None
        try:
            if len(data) > LONGEST:
                raise ValueError("too long")
            entries = json.loads(data)
            entries.pop("block", None)  # of runs that an earlier release began
            TypeAdapter(cls).validate_python(entries)
            return cls(**entries)
        except (TypeError, ValueError, AttributeError, RecursionError):
            problem = f"{source} is not a record of this release's"
            raise UsageError(f"{problem}; go on with the one that wrote it, or start anew by --no-resume") from None


def earlier_run(config: FitConfig, place: Place) -> RunRecord | None:
    """The run that `config` goes on with, None where it starts. The places of another run are refused."""
    if not config.saving.resume:
        return None
    here = _own_record(config.out)
    there = RunRecord.from_bytes(place.store.read(RECORD), f"{place.store.uri}/{RECORD}")
    if here and there and here.name != there.name:
        problem = f"{place.store.uri} holds the checkpoints of {there.name}, {config.out} is {here.name}"
        raise UsageError(f"{problem}; choose another --checkpoints, or start anew with --no-resume")
    record = there or here
    if record is None:
        return None
    _check_same(_what(record.config), plain(as_begun(config, record)), config.out)
    return record


def as_begun(config: FitConfig, record: RunRecord | None) -> FitConfig:
    """The config with the warm-up that the run began with, if none is given: defaults of a release may differ."""
    if record is None or config.optimization.warmup is not None or "warmup" not in record.config:
        return config
    optimization = config.optimization.model_copy(update={"warmup": record.config["warmup"]})
    return config.model_copy(update={"optimization": optimization})


def check_place(record: RunRecord, place: Place, out: Path) -> None:
    """Refuse a place without checkpoints where the run's are in another."""
    uri = place.store.uri if place.elsewhere else None
    if record.place != uri:
        before = record.place or out
        problem = f"{out} has its checkpoints in {before}, there are none in {place.store.uri}"
        raise UsageError(
            f"{problem}; give the --checkpoints that it had, or copy them there, or start with --no-resume"
        )


def new_record(
    config: FitConfig, place: Place, *, reads: dict[str, Any], model: dict[str, Any], init: dict[str, Any] | None
) -> RunRecord:
    """The record of a run that starts now; in the place of one before, by its name, so that it takes over the pins."""
    name = f"{config.out.name}-{secrets.token_hex(4)}"
    for store in (place.store, Store(str(config.out))):
        with suppress(UsageError):  # what is no record names nothing that could be taken over
            before = RunRecord.from_bytes(store.read(RECORD), store.uri)
            name = before.name if before else name
    return RunRecord(name, plain(config), reads, model, place.store.uri if place.elsewhere else None, init)


def plain(config: FitConfig) -> dict[str, Any]:
    """The settings that identify a run, as JSON, by the names that a user gives them."""
    settings = ungrouped(FitConfig, config.model_dump(mode="json"))
    batch, warmup = config.batch, config.optimization.num_warmup
    return _what(settings) | {"batch_size": batch.size, "lanes": batch.num_lanes, "warmup": warmup}


def _what(settings: dict[str, Any], free: dict[str, Any] = _FREE) -> dict[str, Any]:
    """Settings without those that are free now, which a record of an earlier release may hold."""
    kept = {name: value for name, value in settings.items() if free.get(name) is not True}
    return {name: _what(value, free[name]) if name in free else value for name, value in kept.items()}


def where(store: StoreConfig) -> dict[str, Any]:
    """The store and dataset that a fit reads. Credentials in the store's uri are no part of it."""
    return {"data": store.data and without_credentials(store.data), "dataset": store.dataset}


def _own_record(folder: Path) -> RunRecord | None:
    return RunRecord.from_bytes(Store(str(folder)).read(RECORD), str(folder / RECORD))


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path, prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        there, here = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            _check_same(there, here, out, f"{prefix}{name}.")
        elif there != here:
            problem = f"{out} holds a run with {prefix}{name} {there}, not {here}"
            raise UsageError(f"{problem}; choose another --out, or start it anew with --no-resume")
