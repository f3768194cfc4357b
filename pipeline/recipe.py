"""A configuration and a teacher become a recipe: everything that changes a number, and nothing else."""

import math
from typing import Any

import torch

from limbeck.diffusion import NUMERICS_VERSION, noise
from limbeck.diffusion.frames import frame_for
from limbeck.diffusion.grids import GRIDS, grid_options, near_ratio, recorded_times
from limbeck.diffusion.models.teachers import Teacher
from limbeck.diffusion.process import Process
from limbeck.pipeline.config import GenerateConfig, GridConfig
from limbeck.pipeline.segments import data_start
from limbeck.storage_schemas.layout import Layout, check_layout
from limbeck.storage_schemas.recipe import (
    Condition,
    DataLabels,
    DataStart,
    Guidance,
    NoCondition,
    NoiseRecord,
    PriorStart,
    Recipe,
    SolverRecord,
    TeacherRecord,
    UniformLabels,
)

MICRO_BATCH = 256
"""Samples solved together, by default."""

SHARD, SHARD_BYTES = 2048, 256 << 20
"""Samples of a shard and its bytes, by default: the most of each."""


def build_recipe(config: GenerateConfig, teacher: Teacher) -> Recipe:
    """How the samples that `config` asks for are made. ValueError for what the teacher can't serve.

    A micro-batch still to be found is 1 here: it fits every shard. That of a default is the one of a new dataset.
    """
    if getattr(teacher.denoiser, "has_second_time", False):
        raise ValueError(
            f"{teacher.uri} takes the time that it jumps to and has no ODE to solve: name the teacher before it"
        )
    grid = recorded_grid(config.solver, teacher)
    times = _rounded(_times(config, teacher, grid)).clamp(max=teacher.process.T)
    start = _start(config, teacher)
    frame = frame_for(teacher.process, times)
    last = config.solver.steps
    recipe = Recipe(
        teacher=TeacherRecord(
            uri=teacher.uri,
            weights_sha256=teacher.weights_sha256,
            model=teacher.model,
            source_sha256=teacher.source_sha256,
        ),
        guidance=_guidance(config, teacher),
        solver=SolverRecord(name=config.solver_name, steps=last, frame=frame, grid=grid),
        times=tuple(times.tolist()),
        alphas=tuple(_rounded(teacher.process.alpha(times)).tolist()),
        sigmas=tuple(_rounded(teacher.process.sigma(times)).tolist()),
        states=() if start.kind == "data" else tuple(sorted({0, *config.states, last})),
        start=start,
        condition=_condition(config, teacher),
        noise=NoiseRecord(algorithm=noise.ALGORITHM, version=noise.VERSION, seed=config.seed),
        chain="segment" if start.kind == "data" else "trajectory",
        sample_shape=teacher.sample_shape,
        storage_dtype=config.dtype,
        solve_dtype=config.solve_dtype,
        autocast=config.autocast,
        tf32=config.tf32,
        compile=config.compile,
        channels_last=_channels_last(config, teacher),
        micro_batch=config.micro_batch if isinstance(config.micro_batch, int) else 1,
        numerics_version=NUMERICS_VERSION,
    )
    if config.micro_batch is not None:
        return recipe
    return with_micro_batch(recipe, _most_that_divides(build_layout(config, recipe).samples_per_shard))


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """The same recipe with `size` samples solved together."""
    return recipe.model_copy(update={"micro_batch": size})


def _most_that_divides(samples_per_shard: int) -> int:
    return next(size for size in range(MICRO_BATCH, 0, -1) if samples_per_shard % size == 0)


def build_layout(config: GenerateConfig, recipe: Recipe) -> Layout:
    """How the samples lie in the files of a new dataset."""
    given = {"format": config.format, "compression": config.compression}
    size = config.samples_per_shard or _whole_shard(recipe)
    layout = Layout(samples_per_shard=size, **{name: value for name, value in given.items() if value})
    check_layout(recipe, layout)
    return layout


def _whole_shard(recipe: Recipe) -> int:
    """Samples of a shard of SHARD_BYTES, at most SHARD: a power of two, or whole micro-batches of another number."""
    fitting = max(1, min(SHARD, SHARD_BYTES // recipe.sample_bytes))
    power = 1 << (fitting.bit_length() - 1)
    return recipe.micro_batch * max(1, power // recipe.micro_batch)


def recorded_grid(solver: GridConfig, teacher: Teacher) -> dict[str, Any]:
    """The grid's name and options, with its defaults filled in, so that a default given by hand is the same recipe.

    `scheduler` becomes the grid that the pipeline's scheduler has. ValueError for options that the grid hasn't.
    """
    name, options = solver.grid, dict[str, Any]()
    if name == "scheduler":
        if teacher.scheduler_grid is None:
            raise ValueError(f"{teacher.uri} has no scheduler whose own times are a grid of ours: choose another grid")
        options = dict(teacher.scheduler_grid)
        name = options.pop("name")
    options = _defaults(name, teacher.process) | options | _given(solver)
    if options.get("shift") == 1:  # no shift, as in recipes from before there was one
        del options["shift"]
    known = grid_options(name) if name in GRIDS else ()
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"the {name} grid has no {option} (given {value}): leave it out")
    return {"name": name, **options}


def _defaults(name: str, process: Process) -> dict[str, Any]:
    if name in ("karras", "uniform_logsnr"):
        return {**({"rho": 7.0} if name == "karras" else {}), "r_min": near_ratio(process)}
    whole = {"trailing": {}, "leading": {"offset": 0, "spare": 0}, "linspace": {"spare": 0}}
    return {"end": 0, **whole[name]} if name in whole else {}


def _given(solver: GridConfig) -> dict[str, Any]:
    """The options that are given; mu as the shift that it stands for."""
    names = [name for name in GridConfig.model_fields if name not in ("grid", "mu")]
    given = {name: getattr(solver, name) for name in names if getattr(solver, name) is not None}
    given |= {"times": list(solver.times)} if solver.times else {}  # as a recipe that is read has them
    return given if solver.mu is None else {**given, "shift": float(f"{math.exp(solver.mu):.13g}")}


def _times(config: GenerateConfig, teacher: Teacher, grid: dict[str, Any]) -> torch.Tensor:
    """The grid's times, float64 [N + 1]; own: those that a student was fitted for."""
    steps = config.solver.steps
    if config.solver.grid != "own":
        return recorded_times(grid, teacher.process, steps)
    if steps not in teacher.grids:
        serves = ", ".join(map(str, sorted(teacher.grids))) or "no number of steps, as it is no student"
        raise ValueError(f"{teacher.uri} has no own grid of {steps} steps, it serves {serves}: choose another")
    return torch.tensor(teacher.grids[steps], dtype=torch.float64)


def _start(config: GenerateConfig, teacher: Teacher) -> PriorStart | DataStart:
    if config.start == "prior":
        return PriorStart()
    return data_start(config.start, sample_shape=teacher.sample_shape, num_classes=teacher.num_classes)


def _guidance(config: GenerateConfig, teacher: Teacher) -> Guidance:
    """One scale is kept as a number."""
    scales = config.guidance
    if scales != (1.0,) and teacher.num_classes is None:
        given = " ".join(map(str, scales))
        raise ValueError(f"guidance {given} needs classes, {teacher.uri} has none: leave it at 1")
    if min(scales) < 0 and getattr(teacher.denoiser, "told_guidance", False):
        raise ValueError(f"guidance {scales[0]} can't be taken by {teacher.uri}, only 0 and more: give others")
    return Guidance(scale=scales[0] if len(scales) == 1 else scales)


def _channels_last(config: GenerateConfig, teacher: Teacher) -> bool:
    if config.channels_last and len(teacher.sample_shape) != 3:
        shape = "x".join(map(str, teacher.sample_shape))
        raise ValueError(f"channels-last needs images CxHxW, {teacher.uri} makes {shape}: leave it out")
    return config.channels_last


def _condition(config: GenerateConfig, teacher: Teacher) -> Condition:
    if config.condition == "none" or (config.condition == "auto" and teacher.num_classes is None):
        return NoCondition()
    if teacher.num_classes is None:
        raise ValueError(f"condition uniform_labels needs classes, {teacher.uri} has none: use condition none")
    if config.start != "prior":
        return DataLabels(num_classes=teacher.num_classes)
    return UniformLabels(num_classes=teacher.num_classes)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """The values to 13 digits, so that machines whose pow or exp differ in the last bit still name one recipe."""
    return torch.tensor([float(f"{value:.13g}") for value in values.tolist()], dtype=torch.float64)
