"""From what a dataset stores and what is to be fitted to the stages of a fit: which objective, on which states."""

from collections.abc import Callable, Sequence
from typing import Any

from diffusion.grids import subset_indices, uniform_time
from diffusion.process import RectifiedFlow
from storage_schemas.dataset import Dataset
from storage_schemas.errors import ManifestMismatch
from storage_schemas.images import summary
from storage_schemas.recipe import Recipe
from storage_schemas.record import state_column
from trainer.config import FitConfig
from trainer.images import load_images
from trainer.objectives.consistency import Consistency
from trainer.objectives.ctm import ConsistencyTrajectory
from trainer.objectives.distances import Distance, distance
from trainer.objectives.dmd import DistributionMatching, RealImages
from trainer.objectives.flow_map import FlowMapOracle
from trainer.objectives.knowledge import Knowledge
from trainer.objectives.options import ObjectiveConfig
from trainer.objectives.progressive import Progressive, ProgressiveSegments
from trainer.objectives.reflow import Reflow
from trainer.objectives.sid import ScoreIdentity
from trainer.objectives.vsd import VariationalScore
from trainer.objectives.weights import Weighting
from trainer.plan import Stage

Times = tuple[float, ...]

_MOST_STEPS = 8
"""Jumps that a student of all stored states is saved to serve at most, unless a schedule is told."""


def stages(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    """The stages of an objective on a dataset. ManifestMismatch where it lacks states, or holds other chains."""
    if dataset.recipe.chain == "segment":
        return (_segment_stage(config, dataset),)
    return _BUILDERS[config.objective.name](config, dataset)


def _knowledge(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    recipe, times = dataset.recipe, _ends(dataset.recipe)
    return (Stage("knowledge", Knowledge(times, distance(config.objective, recipe.sample_shape)), times),)


def _progressive(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    grids = _stored_grids(dataset, config.objective.schedule or ())
    return tuple(_progressive_stage(dataset.recipe, indices) for indices in grids.values())


def _progressive_stage(recipe: Recipe, indices: Sequence[int]) -> Stage:
    times = _times(recipe, indices)
    columns = tuple(state_column(index, recipe.num_steps) for index in indices)
    return Stage(f"{len(indices) - 1}-step", Progressive(times, columns), times)


def _segment_stage(config: FitConfig, dataset: Dataset) -> Stage:
    """A round of progressive distillation: one stage, of a student of half as many steps."""
    recipe, options, half = dataset.recipe, config.objective, dataset.recipe.num_steps // 2
    if options.name != "progressive" or options.schedule != (half,):
        told = f"{dataset.store.uri} holds segments of {recipe.num_steps} steps in {dataset.manifest.dataset}"
        raise ManifestMismatch(
            f"{told}, which serve --objective.name progressive with --objective.schedule {half}: "
            "fit that, or name another --dataset"
        )
    return Stage(f"{half}-step", ProgressiveSegments(recipe.times), recipe.times[::2])


def _flow_map(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    _check_distance(config.objective, "states at every noise level")
    times, columns, d, weighting = _of_all_states(config, dataset)
    objective = FlowMapOracle(times, columns, d, weighting)
    return (Stage("flow_map", objective, _ends(dataset.recipe), _served(config, dataset)),)


def _ctm(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    times, columns, d, weighting = _of_all_states(config, dataset)
    denoising_weight = config.objective.denoising_weight or 0.0
    objective = ConsistencyTrajectory(times, columns, d, weighting, denoising_weight, config.seed)
    return (Stage("ctm", objective, _ends(dataset.recipe), _served(config, dataset)),)


def _consistency(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    objective = Consistency(*_of_all_states(config, dataset))
    return (Stage("consistency", objective, _ends(dataset.recipe), _served(config, dataset), sampling="renoise"),)


def _of_all_states(config: FitConfig, dataset: Dataset) -> tuple[Times, tuple[str, ...], Distance, Weighting]:
    """(times, columns, distance, weighting) of an objective on every stored state."""
    _check_inner(config, dataset)
    recipe, options = dataset.recipe, config.objective
    weighting = Weighting(options.weighting or "uniform")
    return _times(recipe, recipe.states), _columns(recipe), distance(options, recipe.sample_shape), weighting


def _reflow(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    _check_distance(config.objective, "velocities")
    recipe, options = dataset.recipe, config.objective
    objective = Reflow(
        noise_scale=recipe.sigmas[0],
        distance=distance(options, recipe.sample_shape),
        weighting=Weighting(options.weighting or "uniform"),
    )
    grids = {steps: tuple(uniform_time(RectifiedFlow(), steps).tolist()) for steps in options.schedule or ()}
    return (Stage("reflow", objective, (1.0, 0.0), grids),)


def _dmd(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    recipe, options = dataset.recipe, config.objective
    if options.gan:
        _check_features(recipe.teacher.model)
    objective = DistributionMatching(
        **_matching(config, dataset),
        distance=distance(options, recipe.sample_shape),
        regression=options.regression or 0.0,
        gan=options.gan or 0.0,
        real=_real_images(config.images, recipe) if config.images else None,
    )
    return (_matching_stage("dmd", objective),)


def _vsd(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    return (_matching_stage("vsd", VariationalScore(**_matching(config, dataset))),)


def _sid(config: FitConfig, dataset: Dataset) -> tuple[Stage, ...]:
    return (_matching_stage("sid", ScoreIdentity(**_matching(config, dataset) | {"a": config.objective.a})),)


def _matching(config: FitConfig, dataset: Dataset) -> dict[str, Any]:
    """What dmd, vsd and sid share. ValueError for a teacher that can't be what is asked of it."""
    options, model = config.objective, dataset.recipe.teacher.model
    if config.critic.kind == "lora" and model["kind"] != "network":
        raise ValueError(f"critic.kind lora changes a network's weights, the teacher is a {model['kind']}; use copy")
    if options.guidance not in (None, 1.0) and model["num_classes"] is None:
        raise ValueError(f"objective.guidance {options.guidance} needs a teacher with classes; leave it out")
    if (options.guidance or 0.0) < 0 and model.get("network", {}).get("told_guidance"):
        raise ValueError(f"objective.guidance {options.guidance}: its teacher is told scales of 0 and more; give one")
    return {
        "times": _steps_of(config, dataset),
        "critic_steps": options.critic_steps,
        "t_range": options.t_range,
        "seed": config.seed,
    }


def _check_features(model: dict[str, Any]) -> None:
    """Refuse a network whose inner features a discriminator can't be told."""
    blocks = model.get("network", {}).get("config", {}).get("down_block_types", ())
    if skips := [name for name in blocks if "Skip" in name]:
        told = f"objective.gan: the teacher's UNet has {skips[0]}, whose inner features can't be had"
        raise ValueError(f"{told}; leave it out, or distil a teacher of other blocks")


def _real_images(uri: str, recipe: Recipe) -> RealImages:
    images, labels = load_images(uri, "train")
    if images.shape[1:] != recipe.sample_shape:
        told = f"images {uri} are {list(images.shape[1:])}, the samples are {list(recipe.sample_shape)}"
        raise ValueError(f"{told}; name images of theirs, or leave --images out to take stored outputs for real")
    return RealImages(images, labels, said=summary(uri, "train", images.numpy(), labels.numpy()))


def _matching_stage(name: str, objective: DistributionMatching | VariationalScore | ScoreIdentity) -> Stage:
    """Validated by its first jump straight to the data, which is all that a student of one step does."""
    times = objective.times
    return Stage(name, objective, (times[0], times[-1]), {len(times) - 1: times}, sampling="renoise")


_BUILDERS: dict[str, Callable[[FitConfig, Dataset], tuple[Stage, ...]]] = {
    "knowledge": _knowledge,
    "progressive": _progressive,
    "flow_map": _flow_map,
    "ctm": _ctm,
    "consistency": _consistency,
    "reflow": _reflow,
    "dmd": _dmd,
    "vsd": _vsd,
    "sid": _sid,
}


def _ends(recipe: Recipe) -> Times:
    return recipe.times[0], recipe.times[-1]


def _times(recipe: Recipe, indices: Sequence[int]) -> Times:
    return tuple(recipe.times[index] for index in indices)


def _columns(recipe: Recipe) -> tuple[str, ...]:
    return tuple(state_column(index, recipe.num_steps) for index in recipe.states)


def _steps_of(config: FitConfig, dataset: Dataset) -> Times:
    """The grid of a student of student_steps, nested in the recipe's: its states need not be stored."""
    recipe = dataset.recipe
    return _times(recipe, subset_indices(recipe.num_steps, config.objective.student_steps or 1))


def _check_inner(config: FitConfig, dataset: Dataset) -> None:
    """Refuse data of noises and outputs alone, of which there is nothing to learn but knowledge."""
    recipe = dataset.recipe
    if len(recipe.states) > 2:
        return
    quarters = {recipe.num_steps * quarter // 4 for quarter in (1, 2, 3)} - {0}
    way = f"generate with --states {' '.join(map(str, sorted(quarters)))}, or " if quarters else ""
    told = f"{dataset.store.uri} stores states {' '.join(map(str, recipe.states))}"
    raise ManifestMismatch(f"{told}, {config.objective.name} learns from those between: {way}fit knowledge")


def _check_distance(options: ObjectiveConfig, compared: str) -> None:
    """Refuse LPIPS for what is no image."""
    if options.distance == "lpips":
        raise ValueError(f"distance lpips compares images, {options.name} compares {compared}; choose another")


def _served(config: FitConfig, dataset: Dataset) -> dict[int, Times]:
    """The grids that a student of all stored states is saved with: those told, or all up to 8 steps that there are."""
    recipe, told = dataset.recipe, config.objective.schedule
    divisors = [steps for steps in range(1, _MOST_STEPS + 1) if recipe.num_steps % steps == 0]
    stored = [steps for steps in divisors if set(subset_indices(recipe.num_steps, steps)) <= set(recipe.states)]
    return {steps: _times(recipe, indices) for steps, indices in _stored_grids(dataset, told or stored).items()}


def _stored_grids(dataset: Dataset, schedule: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Indices of each number of steps. ManifestMismatch, with what to store, where the dataset lacks some."""
    recipe = dataset.recipe
    grids = {steps: subset_indices(recipe.num_steps, steps) for steps in schedule}
    needed = {index for indices in grids.values() for index in indices}
    if missing := sorted(needed - set(recipe.states)):
        inner = " ".join(map(str, sorted(needed - {0, recipe.num_steps})))
        have = " ".join(map(str, recipe.states))
        raise ManifestMismatch(
            f"{dataset.store.uri} stores states {have}, this schedule needs also {' '.join(map(str, missing))}: "
            f"generate with --states {inner}"
        )
    return grids
