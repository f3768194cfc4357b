"""A student's costs, from what its run has written: seconds of training, and of its teacher's time before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.storage_schemas.backends import split_uri
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.store import Store
from limbeck.trainer.networks.student import find_student, saved_model
from limbeck.trainer.runs.place import METRICS, RECORD, lines_of
from limbeck.trainer.runs.record import RunRecord

_AT_ONCE = 1024


@dataclass(frozen=True)
class Costs:
    """train_seconds and teacher_seconds: with the runs that it started from, if still there; others: of its own alone.

    teacher_seconds: of all workers together, for the shards that were read; 0 for a student that reads noise only, None
    where the store does not say any more. memory_mib: the peak, of the device where that is a GPU.
    """

    train_seconds: float
    teacher_seconds: float | None
    samples_per_s: float
    data_wait: float
    memory_mib: float | None


def student_costs(run_or_model: Path, steps: int, data: str) -> Costs | None:
    """Costs of the student that samples in `steps` jumps; None for a model without its run.

    data: the store that the user names. No other is asked, whatever a run's record says.
    """
    try:
        return _costs(run_or_model, steps, data)
    except (UserError, OSError, LookupError, TypeError, ValueError, ArithmeticError):
        return None  # of records and metrics that are not as a fit leaves them


def _costs(run_or_model: Path, steps: int, data: str) -> Costs | None:
    runs = list(_lineage(run_or_model, find_student(run_or_model, steps).about))
    if not runs or not runs[0].lines:
        return None
    own = runs[0]
    memory = [line["memory_mib"] for line in own.lines if "memory_mib" in line]
    return Costs(
        train_seconds=sum(run.seconds for run in runs),
        teacher_seconds=_teacher_seconds(runs, data),
        samples_per_s=own.samples / own.seconds,
        data_wait=sum(line["data_wait"] * spent for line, _, spent in own.spans) / own.seconds,
        memory_mib=max(memory, default=None),
    )


@dataclass(frozen=True)
class _Run:
    """A run's record, what its model says of itself, and its lines of metrics up to that model."""

    record: RunRecord
    about: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def spans(self) -> Iterator[tuple[Mapping[str, Any], int, float]]:
        """(line, samples, seconds) since the line before."""
        before, batch_size = 0, self.record.config["batch_size"]
        for line in self.lines:
            samples = (line["step"] - before) * batch_size
            yield line, samples, samples / line["samples_per_s"]
            before = line["step"]

    @property
    def samples(self) -> int:
        return sum(samples for _, samples, _ in self.spans)

    @property
    def seconds(self) -> float:
        return sum(spent for _, _, spent in self.spans)

    @property
    def manifests(self) -> set[int]:
        """Numbers of the manifests that it read."""
        return {self.record.reads["manifest"]} | {line["manifest"] for line in self.lines if "manifest" in line}


def _lineage(model: Path, about: Mapping[str, Any]) -> Iterator[_Run]:
    """The run of a model, then that of the student which it started from, and so on; a teacher's is no part of it."""
    folder = next((path for path in (model, *model.parents[:2]) if (path / RECORD).is_file()), None)
    if folder is None:
        return
    record = RunRecord.from_bytes((folder / RECORD).read_bytes(), str(folder / RECORD))
    if record is None or "manifest" not in record.reads:
        return
    lines = lines_of(folder / METRICS)
    upto = about.get("steps", lines[-1]["step"] if lines else 0)
    yield _Run(record, about, [line for line in lines if "samples_per_s" in line and line["step"] <= upto])
    before = Path(str(record.config.get("init")))
    if before.is_dir() and before.resolve().is_relative_to(
        folder.resolve().parent
    ):  # a run beside it: no other is asked
        yield from _lineage(before, saved_model(before).about)


def _teacher_seconds(runs: Sequence[_Run], data: str) -> float | None:
    """Seconds for every shard that a run read, each once; None where one has read another store than `data`."""
    found: dict[tuple[str, str], float] = {}
    try:
        for run in runs:
            if set(run.about.get("columns", ["output"])) - {"noise"}:
                if split_uri(run.record.reads["data"])[:2] != split_uri(data)[:2]:
                    return None
                for number in run.manifests:
                    found |= _solved(data, run.record.reads["dataset"], number)
    except (UserError, OSError):
        return None
    return sum(found.values())


def _solved(uri: str, name: str, number: int) -> Iterator[tuple[tuple[str, str], float]]:
    """((store, commit), seconds) of each train shard of a manifest."""
    store = Store.open(uri)
    paths = [shard.commit_path for shard in open_dataset(store, name, number).shards("train")]
    for first in range(0, len(paths), _AT_ONCE):
        some = paths[first : first + _AT_ONCE]
        for path, data in zip(some, store.read_many(some), strict=True):
            if data is not None:
                yield (uri, path), Commit.from_bytes(data, f"{uri}/{path}").seconds
