"""The rounds of progressive distillation as pure functions of the config: what each solves, and what it fits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.pipeline.config import GenerateConfig, JobConfig, TeacherConfig
from limbeck.pipeline.rounds.config import ProgressiveConfig

FIRST_ONLY = ("init", "network.name", "network.width", "network.depth", "prediction", "sigma-data", "told-guidance")
"""Options of the trainer that say how a student begins: later ones begin as the student before them."""


@dataclass(frozen=True)
class Round:
    """One round: the data that it brings about, the folder of its fit, and the trainer's words for it."""

    steps: int
    data: GenerateConfig
    out: Path
    fit: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.steps}-step"

    @property
    def student(self) -> Path:
        """The model that it promotes."""
        return self.out / "model"


def rounds_of(config: ProgressiveConfig, *, takes_guidance: bool = False) -> list[Round]:
    """All rounds, the first teacher's first. takes_guidance: whether its students do."""
    rounds = []
    teacher = config.teacher
    for number, steps in enumerate(config.schedule, start=1):
        out = config.out / f"{steps}-step"
        data = _data(config, teacher, 2 * steps, number=number, takes_guidance=takes_guidance)
        fit = _fit(config, data, out, schedule=(steps,), first=number == 1)
        rounds.append(Round(steps, data, out, fit))
        teacher = str(out / "model")
    return rounds


def reference_of(config: ProgressiveConfig) -> GenerateConfig:
    """The first teacher's trajectories, every state stored: what errors are measured against."""
    return _trajectories(config, dataset=config.reference, count=config.num_holdout)


def direct_of(config: ProgressiveConfig, *, count: int) -> Round:
    """One fit of all stages on the first teacher's own states, of `count` trajectories."""
    data = _trajectories(config, dataset=f"{config.dataset}-direct", count=count)
    out = config.out / "direct"
    return Round(config.schedule[-1], data, out, _fit(config, data, out, schedule=config.schedule, first=True))


def _data(config: ProgressiveConfig, teacher: str, steps: int, *, number: int, takes_guidance: bool) -> GenerateConfig:
    """The round's data. A student that takes no guidance scale has the first teacher's in what it was fitted to."""
    later: dict[str, Any] = {"guidance": 1.0} if number > 1 and not takes_guidance else {}
    grid = {"grid": "own"} if number > 1 else config.solver.model_dump()
    return _generate(
        config,
        teacher=teacher,
        dataset=f"{config.dataset}-{steps // 2}",
        start=config.start,
        solver={**grid, "name": "ddim", "steps": steps},
        states=tuple(range(1, steps)) if config.start == "prior" else (),
        seed=config.seed + number * config.fresh_noise,
        **later,
    )


def _trajectories(config: ProgressiveConfig, *, dataset: str, count: int) -> GenerateConfig:
    solver = {**config.solver.model_dump(), "name": "ddim", "steps": config.num_steps}
    return _generate(config, dataset=dataset, count=count, solver=solver, states=tuple(range(1, config.num_steps)))


def _generate(config: ProgressiveConfig, **changes: Any) -> GenerateConfig:
    shared = {name: getattr(config, name) for name in (*TeacherConfig.model_fields, *JobConfig.model_fields)}
    given = {**shared, "holdout": config.num_holdout, **changes}
    # What a `python:` factory makes is code, which no store can keep.
    kept = not str(given["teacher"]).startswith("python:")
    return GenerateConfig.model_validate({**given, "as_json": False, "with_weights": kept})


def _fit(
    config: ProgressiveConfig, data: GenerateConfig, out: Path, *, schedule: tuple[int, ...], first: bool
) -> tuple[str, ...]:
    options = {name: values for name, values in config.fit_options.items() if first or name not in FIRST_ONLY}
    if place := options.get("checkpoints"):  # a run has a place of its own
        options["checkpoints"] = (f"{place[0].rstrip('/')}/{out.name}",)
    ours = {
        "data": (data.store,),
        "dataset": (data.dataset,),
        "objective.name": ("progressive",),
        "objective.schedule": tuple(map(str, schedule)),
        "init": options.pop("init", ("teacher",)),
        "out": (str(out),),
    }
    return "fit", *_words(ours), *_words(options)


def _words(options: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for name, values in options.items():
        yield f"--{name}"
        yield from values
