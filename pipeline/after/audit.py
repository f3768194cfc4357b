"""`verify --audit K`: is what is stored what the recipe says? Beyond checksums, which a wrong shard can have, too.

What needs the teacher is `not done` without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from limbeck.diffusion.models.schedulers import IGNORABLE
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.diffusion.recipes.teacher import NoTeacher, TeacherSource
from limbeck.pipeline.after import checks
from limbeck.pipeline.after.accuracy import error_check, replay_check
from limbeck.pipeline.after.checks import Check
from limbeck.pipeline.after.duplicates import Fingerprints, Repeats, Sample
from limbeck.pipeline.after.normality import NoiseSums
from limbeck.pipeline.after.resolve import Resolved, Stored, resolve
from limbeck.pipeline.after.scan import Findings, scan_shard
from limbeck.pipeline.before.parity import measure
from limbeck.pipeline.config import ParityConfig, VerifyConfig
from limbeck.pipeline.job.in_order import in_order
from limbeck.pipeline.producer import WorkOrder
from limbeck.pipeline.workers.one_call import run_once
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import UsageError, UserError
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import Shard

REPLAYS = 4
"""Number of the samples solved again that are solved with their whole micro-batch, for the same bits."""


PARITY_STEPS = 10
"""Steps of a pipeline's own scheduler beside ours."""


@dataclass(frozen=True)
class Scanned:
    """The pass over all shards: what is wrong with bytes, the sums, and which noises occur twice."""

    problems: tuple[str, ...]
    findings: Findings
    repeats: Repeats


def audit(dataset: Dataset, config: VerifyConfig) -> tuple[list[str], list[Check]]:
    """What is wrong with the shards' bytes, and every check. Raises UserError for a teacher that isn't the recipe's."""
    assert config.audit
    refuse_segments(dataset.recipe)
    if config.runner == "local":
        pick_device(config.device)
    source = TeacherSource(dataset.store, dataset.recipe, config.teacher)
    no_teacher = _why_no_teacher(source, config)
    scanned = scan(dataset, pick(dataset, config.audit, config.seed))
    found = scanned.findings
    if not found.rows:
        return list(scanned.problems), [Check("audit", False, "there are no rows to look at")]
    order = WorkOrder(dataset.store, dataset.recipe, dataset.layout, config.device, config.threads)
    if no_teacher:
        solved = [Check("solver error", None, no_teacher)]
    else:
        solved = _solved(dataset, found, run_once(_resolve, source, order, found.picked, runner=config), config)
        solved += _beside_its_scheduler(source.uri or dataset.recipe.teacher.uri, dataset.recipe, config)
    beside = [checks.beside_images(found, config.images)] if config.images else []
    return list(scanned.problems), [*of_rows(dataset, scanned), *beside, *solved]


def of_rows(dataset: Dataset, scanned: Scanned) -> list[Check]:
    """The checks that need no teacher."""
    found = scanned.findings
    return [
        checks.own_noise(dataset.recipe, found.picked),
        checks.duplicates(dataset, found.rows, scanned.repeats),
        *checks.normality(found),
        *checks.values(found),
        checks.quarantine(dataset, found.rows),
        checks.labels(dataset.recipe, found),
        *checks.guidance(dataset.recipe, found),
    ]


def _beside_its_scheduler(uri: str, recipe: Recipe, config: VerifyConfig) -> list[Check]:
    """Whether a pipeline is read rightly: its own scheduler beside our solve, at the scheduler's own times.

    A dataset that is solved again says nothing of that: the same mistake is made twice.
    """
    if not uri.startswith("diffusers:") or len(recipe.guidance.scales) > 1:
        return []
    (guidance,) = recipe.guidance.scales
    asked = ParityConfig(
        teacher=uri, ignore=IGNORABLE, steps=PARITY_STEPS, count=2, guidance=guidance, device=config.device
    )
    try:
        parity = run_once(measure, asked, runner=config)
    except UsageError as error:
        return [Check("the pipeline's own scheduler", None, str(error))]
    detail = f"{parity.scheduler} differs from our {parity.solver} by {parity.worst:.2g} of a state's rms at most"
    return [Check("the pipeline's own scheduler", parity.worst <= asked.tolerance, detail, {"worst": parity.worst})]


def _resolve(source: TeacherSource, order: WorkOrder, picked: Sequence[Stored]) -> Resolved:
    return resolve(source, order, picked, replays=REPLAYS)


def refuse_segments(recipe: Recipe) -> None:
    """An audit re-solves x_T -> x_0."""
    if recipe.chain != "trajectory" or recipe.start.kind != "prior":
        raise UserError("only trajectories from the prior are solved again; this dataset holds other chains")


def _why_no_teacher(source: TeacherSource, config: VerifyConfig) -> str:
    """Empty if the teacher is there. A teacher that was named, or that a tolerance needs, must be."""
    try:
        source.load()
        return ""
    except NoTeacher as error:
        if config.teacher or config.tolerance is not None:
            raise
        return f"{error}; so nothing was solved again"


def pick(dataset: Dataset, count: int, seed: int) -> frozenset[Sample]:
    """`count` samples of the window, both splits alike, by a seed; all of them if there are no more."""
    sizes = [dataset.ids(split).count for split in SPLITS]
    total = sum(sizes)
    places = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    parts = places[places < sizes[0]], places[places >= sizes[0]] - sizes[0]
    return frozenset(
        Sample(split, i)
        for split, part in zip(SPLITS, parts, strict=True)
        for i in dataset.ids(split).at(part).tolist()
    )


def scan(dataset: Dataset, picked: frozenset[Sample]) -> Scanned:
    """Read every shard once."""
    problems: list[str] = []
    total = Findings(NoiseSums(dataset.recipe.sample_shape))
    samples = sum(dataset.ids(split).count for split in SPLITS)
    with TemporaryDirectory(prefix="limbeck-") as scratch, Fingerprints(Path(scratch), samples) as prints:
        for wrong, found in in_order(lambda shard: _scanned(dataset, shard, picked), dataset.table):
            problems += wrong
            if found is not None:
                prints.add(found.records)
                total = total.plus(found)
        return Scanned(tuple(problems), total, prints.repeats())


def _scanned(dataset: Dataset, shard: Shard, picked: frozenset[Sample]) -> tuple[list[str], Findings | None]:
    try:
        problems, found = scan_shard(dataset, shard, picked)
    except UserError as error:
        problems, found = [str(error)], None
    return [f"{shard.task}: {problem}" for problem in problems], found


def _solved(dataset: Dataset, found: Findings, resolved: Resolved, config: VerifyConfig) -> list[Check]:
    places = range(1, len(dataset.recipe.states))
    errors = [error_check(dataset.recipe, found, resolved, place, config) for place in places]
    return [*errors, replay_check(dataset.recipe, found, resolved)]
