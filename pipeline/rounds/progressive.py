"""`progressive`: round after round, data from the last student, its fit, its promotion. What is done stays done.

Each part is brought about by a command that does nothing where it was done before: `generate` for the data, the
trainer, which goes on from its last checkpoint, `evaluate` for the errors. progressive.json says which of them are.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.diffusion.denoiser import Guided
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.description import described
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.generate import bring_about, grown
from limbeck.pipeline.job.outcome import FAILED, QUARANTINED
from limbeck.pipeline.job.prepare import load
from limbeck.pipeline.recipe import build_layout, build_recipe
from limbeck.pipeline.rounds import launch
from limbeck.pipeline.rounds.config import ProgressiveConfig
from limbeck.pipeline.rounds.plan import Round, direct_of, reference_of, rounds_of
from limbeck.pipeline.rounds.record import Record, only_run
from limbeck.pipeline.rounds.report import show
from limbeck.pipeline.workers.signals import stoppable
from limbeck.storage_schemas.dataset import Dataset, latest_manifest, open_dataset
from limbeck.storage_schemas.errors import UsageError, UserError, usage_errors
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store


def run_progressive(config: ProgressiveConfig) -> int:
    """The exit code: 0, or 3 where some samples were not finite."""
    with only_run(config.out) as lock, stoppable():
        record = Record(config)
        work = Progressive(config, record, lock)
        work.run()
    print(json.dumps(record.plain)) if config.as_json else show(config, record.plain)
    return QUARANTINED if work.quarantined else 0


class Progressive:
    """One run of the command, which goes on where the record ends."""

    def __init__(self, config: ProgressiveConfig, record: Record, lock: int) -> None:
        self.config, self.record, self._lock = config, record, lock
        self.quarantined = False

    def run(self) -> None:
        """Run all rounds to the end."""
        rounds = self._rounds()
        if not self.record.plain["rounds"]:
            self._check_first(rounds[0])
            self._check_free(rounds[1:])
        if any("error" not in self.record.round(part.steps) for part in rounds):
            self._make_reference()
        for number in range(len(rounds)):
            self._round(self._rounds()[number])
        if self.config.compare_direct and "errors" not in self.record.plain["direct"]:
            self._make_reference()
            self._fit_direct(self.direct())

    def _rounds(self) -> list[Round]:
        """All rounds as they are known now: only the first student says whether students take their guidance scale."""
        first, *_ = rounds_of(self.config)
        return rounds_of(self.config, takes_guidance=_takes_guidance(first.student))

    def _round(self, part: Round) -> None:
        done = self.record.round(part.steps)
        if "student" not in done:
            dataset = self._bring_about(part.data)
            self.record.note_round(
                part.steps,
                dataset=dataset.manifest.dataset,
                manifest=dataset.manifest.number,
                recipe=dataset.recipe.id,
                teacher=dataset.recipe.teacher.weights_sha256,
                calls=_calls(part, dataset),
                solve_seconds=_solve_seconds(dataset),
            )
            with _timed(done, lambda **facts: self.record.note_round(part.steps, **facts)):
                launch.fit(self.config, part, lock=self._lock)
            self.record.note_round(part.steps, student=_hash(part.student))
            log.info(f"{part.name}: {part.student} is promoted")
        elif done["student"] != _hash(part.student):
            problem = f"{part.student} is not the student that was promoted ({done['student'][:12]})"
            raise UserError(f"{problem}: put it back, or choose another --out")
        if "error" not in done:
            self.record.note_round(part.steps, **self._measured(part.out, (part.steps,))[part.steps])

    def _check_first(self, part: Round) -> None:
        """Refuse what the first round can't solve, before any work."""
        with usage_errors():
            build_layout(part.data, build_recipe(part.data, load(part.data)))

    def _check_free(self, rounds: list[Round]) -> None:
        """Refuse names of datasets that another folder's students filled: round 1 is all that two may share."""
        for part in rounds:
            there = _there(part.data)
            if there and there.recipe.teacher.uri != part.data.teacher:
                problem = f"dataset {part.data.dataset} of {there.store.uri} is of {there.recipe.teacher.uri}"
                raise UsageError(f"{problem}, which is no student of {self.config.out}: choose another --dataset")

    def _make_reference(self) -> None:
        """The dataset that errors are measured on: there by this or another run, or made now."""
        if self.record.plain["reference"]:
            return
        data = reference_of(self.config)
        with usage_errors():
            asked = build_recipe(data, load(data))
        dataset = _there(data) or self._bring_about(data)
        _check_reference(dataset, asked)
        facts = {"manifest": dataset.manifest.number, "teacher": asked.teacher.weights_sha256}
        self.record.note("reference", dataset=data.dataset, **facts)

    def direct(self) -> Round:
        """Direct distillation on as many network calls of the first teacher as all rounds took."""
        paid = sum(self.record.round(steps)["calls"] for steps in self.config.schedule)
        return direct_of(self.config, count=max(1, round(paid / (self.config.num_steps * self._calls_a_step()))))

    def _calls_a_step(self) -> int:
        """Network calls of a step of the first teacher's ddim."""
        if self.config.guidance == (1.0,):
            return 1
        return Guided(load(self.config).denoiser, *self.config.guidance).nfe_per_call

    def _fit_direct(self, part: Round) -> None:
        """Direct progressive distillation, on as many network calls, with as many steps a stage."""
        dataset = self._bring_about(part.data)
        self.record.note("direct", calls=_calls(part, dataset), solve_seconds=_solve_seconds(dataset))
        if "student" not in self.record.plain["direct"]:
            with _timed(self.record.plain["direct"], lambda **facts: self.record.note("direct", **facts)):
                launch.fit(self.config, part, lock=self._lock)
            self.record.note("direct", student=_hash(part.student))
        found = self._measured(part.out, self.config.schedule)
        self.record.note("direct", errors={str(steps): figures["error"] for steps, figures in found.items()})

    def _bring_about(self, data: GenerateConfig) -> Dataset:
        """`generate`, in this process."""
        outcome = bring_about(data, partial(grown, data))
        if outcome.exit_code == FAILED:
            raise UserError(f"{data.dataset}: {outcome.why}; the same command tries again")
        self.quarantined |= outcome.exit_code == QUARANTINED
        log.info(f"{data.dataset}: {'solved' if outcome.what == 'sealed' else 'there already'}")
        return open_dataset(Store.open(data.store), data.dataset)

    def _measured(self, run: Path, schedule: tuple[int, ...]) -> dict[int, dict[str, Any]]:
        """Errors by number of steps: mean squared, against the first teacher, of the student and of its own ddim."""
        reference = self.record.plain["reference"]
        where = ["--data", self.config.store, "--dataset", reference["dataset"]]
        where += ["--manifest", str(reference["manifest"])]
        # A guided teacher is called twice a step, unless it takes its guidance scale.
        most = 1 if self.config.guidance == (1.0,) else Guided.nfe_per_call
        asked = {steps * calls for steps in schedule for calls in (1, most)}
        nfe = ["--nfe", *map(str, sorted(asked)), *launch.device_of(self.config)]
        found = launch.evaluate([str(run), *where, *nfe, "--out", str(run)])
        by_kind = {(row["kind"], row["name"], row["steps"]): row["holdout_error"] for row in found["rows"]}
        return {
            steps: {
                "error": by_kind["student", str(run), steps],
                "teacher_error": by_kind.get(("teacher", "teacher ddim", steps)),
                "variance": found["output_variance"],
            }
            for steps in schedule
        }


@contextmanager
def _timed(known: dict[str, Any], note: Callable[..., None]) -> Iterator[None]:
    """Seconds that the drivers of a fit have waited for it, those of runs that were stopped too."""
    began, before = time.monotonic(), known.get("fit_seconds", 0.0)
    try:
        yield
    finally:
        note(fit_seconds=round(before + time.monotonic() - began, 1))


def _there(data: GenerateConfig) -> Dataset | None:
    """The latest manifest of a dataset, if it has one."""
    store = Store.create(data.store, single_writer=data.single_writer)
    return open_dataset(store, data.dataset) if latest_manifest(store, data.dataset) else None


def _check_reference(dataset: Dataset, asked: Recipe) -> None:
    """Refuse what is no measure of the students: another teacher's samples, or otherwise guided, labelled or begun."""
    name = f"dataset {dataset.manifest.dataset} of {dataset.store.uri}"
    there, here = _measured_by(dataset.recipe), _measured_by(asked)
    for what in there:
        if there[what] != here[what]:
            problem = f"{name} has {what} {there[what]}, errors are measured at {here[what]}"
            raise UsageError(f"{problem}: give another --reference")
    if dataset.ids("holdout").count < 2:
        raise UsageError(f"{name} has no holdout samples to measure errors on: give another --reference")


def _measured_by(recipe: Recipe) -> dict[str, Any]:
    return {
        "chain": recipe.chain,
        "teacher": recipe.teacher.weights_sha256[:12],
        "guidance": recipe.guidance.as_words,
        "condition": recipe.condition.kind,
        "first time": recipe.times[0],
    }


def _solve_seconds(dataset: Dataset) -> float:
    """Seconds that workers solved for, on whatever day."""
    return round(sum(dataset.commit(shard).seconds for shard in dataset.table), 3)


def _calls(part: Round, dataset: Dataset) -> int:
    """Network calls that its train samples took."""
    return part.data.count * dataset.commit(dataset.table[0]).nfe


def _hash(model: Path) -> str | None:
    found = _document(model)
    return found["weights_sha256"] if found else None


def _takes_guidance(model: Path) -> bool:
    """Whether a student, once it exists, takes its guidance scale."""
    found = _document(model)
    return bool(found and found["model"]["network"].get("told_guidance"))


def _document(model: Path) -> dict[str, Any] | None:
    """model.json of a saved model."""
    file = model / checkpoint.MODEL_FILE
    with usage_errors():
        return described(file.read_bytes(), str(file)) if file.is_file() else None
