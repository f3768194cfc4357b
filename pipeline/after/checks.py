"""What an audit asks of the rows alone: each check is one line with its figure and its verdict.

Honest data fails one of the random ones (those with a p) with probability FALSE_ALARM in all; each gets the same part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.recipes.samples import draw_labels
from limbeck.pipeline.after.duplicates import EXACT_BYTES, Repeats, Sample, collision_tail, expected_pairs
from limbeck.pipeline.after.normality import FEWEST, chi_square_tail, judge_noise
from limbeck.pipeline.after.resolve import Stored
from limbeck.pipeline.after.scan import Findings, labels_asked
from limbeck.storage_schemas.commit import MOST_QUARANTINED
from limbeck.storage_schemas.dataset import Dataset
from limbeck.storage_schemas.errors import UserError
from limbeck.storage_schemas.images import read_images
from limbeck.storage_schemas.recipe import Recipe, UniformLabels
from limbeck.storage_schemas.record import NO_CONDITION, SPLITS, to_storage

FALSE_ALARM = 1e-4
RANDOM_CHECKS = 7
ALARM = FALSE_ALARM / RANDOM_CHECKS

LABELS_EACH = 5.0
LISTED = 100


@dataclass(frozen=True)
class Check:
    """One line of the audit; `passed` is None for what could not be done, and `detail` says why."""

    name: str
    passed: bool | None
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """passed  x_T norms: p 0.31 ..."""
        return f"{ {True: 'passed', False: 'FAILED', None: 'not done'}[self.passed]:<8}  {self.name}: {self.detail}"


def plain(check: Check) -> dict[str, Any]:
    """A check as JSON, which has no infinity and no nan."""
    figures = {name: _finite(value) for name, value in check.figures.items()}
    return {"name": check.name, "passed": check.passed, "told": check.detail, "figures": figures}


def tally(checks: Sequence[Check]) -> str:
    """audit: 12 passed, 1 failed, 0 not done."""
    ends = [check.passed for check in checks]
    return f"audit: {ends.count(True)} passed, {ends.count(False)} failed, {ends.count(None)} not done"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def own_noise(recipe: Recipe, picked: Sequence[Stored]) -> Check:
    """x_T and the label of every picked sample against the pure function of (seed, split, id) that they are."""
    wrong = [str(part.sample) for part in picked if not _is_own(recipe, part)]
    detail = f"{len(picked) - len(wrong)} of {len(picked)} samples have the x_T and the label of their id"
    return Check("x_T of an id", not wrong, detail + named(wrong), {"samples": len(picked), "wrong": wrong})


def _is_own(recipe: Recipe, part: Stored) -> bool:
    asked = draw_labels(recipe, part.sample.split, np.array([part.sample.id]))
    label = NO_CONDITION if asked is None else int(asked[0])
    return int(part.row["condition"]) == label and np.array_equal(part.row["noise"], noise_of(recipe, part.sample))


def noise_of(recipe: Recipe, sample: Sample) -> np.ndarray:
    """x_T of a sample as it must be stored, [*shape]."""
    eps = noise.standard_normal(recipe.noise.seed, sample.split, [sample.id], recipe.sample_shape)
    with np.errstate(over="ignore"):
        return to_storage(recipe.sigmas[0] * eps, recipe.storage_dtype)[0]


def duplicates(dataset: Dataset, rows: int, repeats: Repeats) -> Check:
    """No two samples share an x_T, but for what rounding brings about in few dimensions (duplicates.expected_pairs).

    A group whose ids' own x_T are one is such a collision of the rounded noise itself; any other fails at once.
    """
    recipe = dataset.recipe
    mean, variance = expected_pairs(rows, recipe.sigmas[0], recipe.storage_dtype, math.prod(recipe.sample_shape))
    strangers = [group for group in repeats.groups if not _share_honestly(recipe, group)]
    wrong = [group for group in strangers[:LISTED] if _same_bytes(dataset, group)] + strangers[LISTED:]
    p = collision_tail(repeats.pairs, mean, variance)
    least = "" if repeats.complete else "at least "
    detail = f"{least}{repeats.pairs} pairs share an x_T, {mean:.3g} expected of its rounding, p {p:.2g}"
    names = ["=".join(map(str, group[:8])) for group in (wrong or repeats.groups)[:LISTED]]
    figures = {"pairs": repeats.pairs, "expected": mean, "p": p, "groups": names, "not_their_own": len(wrong)}
    return Check("duplicate x_T", not wrong and p >= ALARM, detail + named(names), figures)


def _share_honestly(recipe: Recipe, group: Sequence[Sample]) -> bool:
    """Whether samples of one hash must have one x_T by their ids."""
    return len({noise_of(recipe, sample).tobytes() for sample in group}) == 1


def _same_bytes(dataset: Dataset, group: Sequence[Sample]) -> bool:
    """Whether the first two samples of one hash are stored with one x_T, byte for byte; a short x_T is its own hash."""
    if math.prod(dataset.recipe.sample_shape) * 2 <= EXACT_BYTES:
        return True
    first, second = (_stored_noise(dataset, sample) for sample in group[:2])
    return first == second


def _stored_noise(dataset: Dataset, sample: Sample) -> bytes:
    shards = dataset.shards(sample.split)
    (place,), (row,) = shards.locate(np.array([sample.id]))
    noises: np.ndarray = dataset.read(shards[int(place)], ["noise"])["noise"]
    return noises[row].tobytes()


def normality(found: Findings) -> list[Check]:
    """x_T ~ N(0, sigma_T^2 I): each family of tests of pipeline/after/normality.py."""
    if found.rows < FEWEST:
        return [Check("x_T is normal", None, f"{found.rows} samples are too few, {FEWEST} are needed")]
    return [
        Check(
            f"x_T {name}",
            verdict.p >= ALARM,
            f"p {verdict.p:.2g}, the least: {verdict.where}",
            {"p": verdict.p, "where": verdict.where},
        )
        for name, verdict in judge_noise(found.noise).items()
    ]


def values(found: Findings) -> list[Check]:
    """Every stored state: finite, below the dtype's largest value; and how much of it lies at its own two extremes."""
    return [
        Check(
            f"values of {name}",
            not spread.not_finite and not spread.saturated,
            f"{spread.not_finite} not finite, {spread.saturated} at the dtype's largest, "
            f"{(spread.at_low + spread.at_high) / spread.values:.2g} of all at {spread.low:.4g} or {spread.high:.4g}",
            {
                "not_finite": spread.not_finite,
                "saturated": spread.saturated,
                "at_extremes": (spread.at_low + spread.at_high) / spread.values,
                "low": spread.low if spread.low <= spread.high else None,
                "high": spread.high if spread.low <= spread.high else None,
            },
        )
        for name, spread in found.states.items()
    ]


def beside_images(found: Findings, uri: str) -> Check:
    """The outputs' range and spread beside those of real images. UserError for images of another shape.

    Outputs may pass the images' range by half of its width, and have half to twice their standard deviation.
    """
    images, _ = read_images(uri)
    shape = found.noise.shape
    if images.shape[1:] != shape:
        raise UserError(f"{uri} has images {list(images.shape[1:])}, the samples are {list(shape)}: name others")
    output, low, high, std = found.states["output"], float(images.min()), float(images.max()), float(images.std())
    room, ratio = (high - low) / 2, output.std / std
    return Check(
        "outputs beside images",
        low - room <= output.low and output.high <= high + room and 0.5 <= ratio <= 2,
        f"in [{output.low:.4g}, {output.high:.4g}], standard deviation {output.std:.3g}; {uri} is in [{low:.4g}, "
        f"{high:.4g}], {std:.3g}",
        {"low": output.low, "high": output.high, "std": output.std, "of_images": [low, high, std]},
    )


def quarantine(dataset: Dataset, rows: int) -> Check:
    """The share of the window's ids that were left out because they were not finite."""
    lost = 0
    for split in SPLITS:
        ids, (start, stop) = dataset.shards(split).quarantined, dataset.manifest.window.bounds(split)
        lost += int(((ids >= start) & (ids < stop)).sum())
    share = lost / (lost + rows)
    detail = f"{lost} of {lost + rows} samples ({share:.2%}, {MOST_QUARANTINED:.0%} may be)"
    return Check("quarantined", share <= MOST_QUARANTINED, detail, {"samples": lost, "share": share})


def labels(recipe: Recipe, found: Findings) -> Check:
    """The histogram of labels against the uniform one that was asked for: Pearson's chi-square."""
    classes = recipe.condition.num_classes if isinstance(recipe.condition, UniformLabels) else None
    counts = labels_asked(found.labels, classes)
    wanted = classes or 1
    figures: dict[str, Any] = {"counts": {str(label): count for label, count in counts.items()}}
    if len(counts) > wanted:
        return Check("labels", False, f"label {list(counts)[-1]} is none of those asked for", figures)
    if classes is None:
        return Check("labels", True, "none was asked for, none is there", figures)
    return _evenly("labels", "a label", list(counts.values()), figures)


def guidance(recipe: Recipe, found: Findings) -> list[Check]:
    """How many of the rows have which of several scales: a scale whose solves run away loses more than the others."""
    scales = recipe.guidance.scales
    if len(scales) == 1:
        return []
    counts = {scale: found.scales.get(scale, 0) for scale in scales}
    figures = {"counts": {str(scale): count for scale, count in counts.items()}}
    return [_evenly("guidance scales", "a scale", list(counts.values()), figures)]


def _evenly(name: str, each_of: str, counts: Sequence[int], figures: dict[str, Any]) -> Check:
    """Pearson's chi-square of counts that should be alike."""
    each = sum(counts) / len(counts)
    if each < LABELS_EACH or len(counts) == 1:
        return Check(name, None, f"{each:.2g} samples {each_of} are too few, {LABELS_EACH:g} are needed", figures)
    statistic, degrees = sum((count - each) ** 2 / each for count in counts), len(counts) - 1
    p = float(chi_square_tail(torch.tensor(statistic, dtype=torch.float64), degrees))
    detail = f"chi-square {statistic:.3g} of {degrees} degrees, p {p:.2g}, counts {min(counts)} to {max(counts)}"
    return Check(name, p >= ALARM, detail, figures | {"p": p})


def named(names: Sequence[str]) -> str:
    return f": {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" if names else ""
