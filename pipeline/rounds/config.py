"""Options of `limbeck progressive`."""

import re
import shlex
from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from limbeck.pipeline.config import ChainStart, DatasetName, GridConfig, JobConfig, TeacherConfig
from limbeck.storage_schemas.command_line import PassedOn
from limbeck.storage_schemas.places import LocalPath

FIRST_STEPS = 16
RAY_JOB = "ray-job"
OURS = ("out", "data", "dataset", "manifest", "images", "objective.name", "objective.schedule", "resume", "no-resume")
"""Options of the trainer that say what a round is."""


class ProgressiveConfig(JobConfig, TeacherConfig):
    """Progressive distillation: each round solves the last student, fits one of half its steps to that, promotes it."""

    out: LocalPath = Field(description="Folder of the students, one a round, and of progressive.json.")
    steps: int | None = Field(
        None, ge=2, description="Steps N of the first teacher's ddim. Default: twice the schedule's first, else 16."
    )
    schedule: tuple[int, ...] = Field(
        (), description="Steps of each round's student. Default: N/2, N/4, ... down to an odd number such as 1."
    )
    solver: GridConfig = GridConfig()
    start: ChainStart = "prior"
    fresh_noise: bool = Field(True, description="Have a seed for each round: seed + 1, seed + 2, and so on.")
    dataset: DatasetName = Field("progressive", description="Rounds are datasets named by this and their steps.")
    reference: DatasetName = Field(
        "main",
        description="The first teacher's trajectories that errors are measured against; made where there are none.",
    )
    compare_direct: bool = Field(
        False,
        description="Fit direct progressive too, on as many network calls of the first teacher as all rounds paid.",
    )
    launch: str = Field(
        "python -m limbeck.trainer",
        description="How a fit is started: this python, or such as 'torchrun --nproc-per-node 2 -m limbeck.trainer'; "
        "'ray-job python -m limbeck.trainer' runs it on a cluster, which must see OUT.",
    )
    dashboard: str = Field("http://127.0.0.1:8265", description="Launch ray-job: address of the cluster's job server.")
    fit: PassedOn = Field((), description="Options of `limbeck fit`, such as --fit.steps 1000 --fit.lr 1e-3.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: object) -> object:
        """The schedule down to 1, or as far as halves go."""
        if not isinstance(given, dict) or given.get("schedule"):
            return given
        steps = given.get("steps") or FIRST_STEPS
        return given | {"schedule": _halves(steps)} if isinstance(steps, int) else given

    @model_validator(mode="after")
    def _rounds_halve(self) -> Self:
        chain = (self.num_steps, *self.schedule)
        if len(chain) < 2 or any(longer != 2 * shorter for longer, shorter in pairwise(chain)):
            problem = f"schedule {list(self.schedule)} does not halve {self.num_steps} steps again and again"
            raise ValueError(f"{problem}: give an even number of steps, and a schedule such as 8 4 2 1 for 16")
        return self

    @model_validator(mode="after")
    def _guidance_is_one(self) -> Self:
        if len(self.guidance) > 1:
            given = " ".join(map(str, self.guidance))
            raise ValueError(f"guidance {given}: all rounds are solved and measured at one scale; give one scale")
        return self

    @model_validator(mode="after")
    def _rounds_are_measured(self) -> Self:
        if self.num_holdout < 2:
            raise ValueError(f"holdout {self.holdout}: errors are measured on it; give 2 samples or more")
        if self.store.startswith("memory://"):
            raise ValueError("a memory:// store lives in one process, the trainer is another: use another store")
        return self

    @model_validator(mode="after")
    def _seeds_are_seeds(self) -> Self:
        if self.fresh_noise and self.seed + len(self.schedule) >= 2**63:
            raise ValueError(f"seed {self.seed} leaves no seed + {len(self.schedule)} below 2^63 to a round: lower it")
        return self

    @model_validator(mode="after")
    def _trainer_takes_options(self) -> Self:
        flags = [word for word in self.fit if word.startswith("--")]
        if self.fit and not self.fit[0].startswith("--"):
            raise ValueError(f"fit {self.fit[0]!r} is no option: write --fit.steps 1000, in YAML fit: {{steps: 1000}}")
        if odd := [flag for flag in flags if not re.fullmatch(r"--[a-z][\w.-]*(=.*)?", flag, re.DOTALL)]:
            raise ValueError(f"fit.{odd[0].removeprefix('--')} is no option: write --fit.steps 1000")
        if "config" in self.fit_options:
            raise ValueError("fit.config is a file that may change between rounds: give its fields, such as fit.steps")
        return self

    @model_validator(mode="after")
    def _trainer_keeps_its_own_options(self) -> Self:
        if taken := sorted(set(self.fit_options) & set(OURS)):
            raise ValueError(f"fit.{taken[0]} is what progressive itself says to the trainer: leave it out")
        if not shlex.split(self.launch):
            raise ValueError("launch is empty: give a command such as 'python -m limbeck.trainer'")
        return self

    @property
    def num_steps(self) -> int:
        """Steps of the first teacher."""
        return self.steps or 2 * self.schedule[0]

    @property
    def fit_options(self) -> dict[str, tuple[str, ...]]:
        """The trainer's options by name, without dashes: steps -> ("1000",)."""
        options: dict[str, tuple[str, ...]] = {}
        for word in self.fit:
            if word.startswith("--"):
                name, equals, value = word.removeprefix("--").partition("=")
                last = name.replace("_", "-")
                options[last] = (value,) if equals else ()
            else:
                options[last] += (word,)
        return options


def _halves(steps: int) -> tuple[int, ...]:
    found = []
    while steps > 1 and steps % 2 == 0:
        steps //= 2
        found.append(steps)
    return tuple(found)
