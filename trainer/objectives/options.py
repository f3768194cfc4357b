"""What an objective can be told, each with options of its own."""

from itertools import pairwise
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from storage_schemas.command_line import Config
from storage_schemas.places import LocalPath

ObjectiveName = Literal[
    "knowledge", "progressive", "flow_map", "ctm", "consistency", "reflow", "dmd", "vsd", "sid", "denoising"
]

DISTRIBUTION_LEVEL = ("dmd", "vsd", "sid")
"""Objectives that need the teacher's network and a critic beside the student."""
TWO_TIMES = ("flow_map", "ctm")
"""Objectives whose student is told the time that it jumps to."""

_DISTANCE: dict[str, Any] = {"distance": "l2", "c": None, "lpips": None}
_MATCHING: dict[str, Any] = {"critic_steps": 1, "student_steps": 1, "t_range": (0.02, 0.98), "guidance": None}
# Each objective's own options; an option of another objective is refused.
_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "knowledge": _DISTANCE,
    "progressive": {"schedule": (8, 4, 2, 1)},
    "flow_map": _DISTANCE | {"weighting": "uniform", "schedule": None},
    "ctm": _DISTANCE | {"weighting": "uniform", "schedule": None, "target_ema": 0.999, "denoising_weight": 1.0},
    "consistency": _DISTANCE | {"weighting": "uniform", "schedule": None, "target_ema": 0.95},
    "reflow": _DISTANCE | {"weighting": "uniform", "schedule": (8, 4, 2, 1)},
    "dmd": _MATCHING | _DISTANCE | {"regression": 0.25, "gan": 0.0},
    "vsd": _MATCHING,
    "sid": _MATCHING | {"a": 1.2},
    "denoising": {"label_dropout": 0.1, "p_mean": -1.2, "p_std": 1.2},
}


class ObjectiveConfig(Config):
    """What the student is fitted to."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: ObjectiveName = Field(
        "knowledge",
        description="A student of one step: knowledge. Of each number of steps in its schedule: progressive, flow_map, "
        "ctm, consistency, reflow. Of student_steps: dmd, vsd, sid. A teacher: denoising.",
    )
    distance: Literal["l2", "l1", "pseudo_huber", "lpips"] | None = Field(
        None, description="Distance to the target, where the objective has one; l2 unless told."
    )
    c: float | None = Field(None, gt=0, description="The width c of pseudo_huber, sqrt(|u|^2 + c^2) - c.")
    lpips: LocalPath | None = Field(
        None,
        description="TorchScript file, which is code that runs, of LPIPS, (a, b) in [-1, 1], [B, 3, H, W] -> one "
        "number a sample, such as torch.jit.trace(lpips.LPIPS(), (a, b)).save(FILE) writes.",
    )
    weighting: Literal["uniform", "snr", "truncated_snr", "learned"] | None = Field(
        None,
        description="flow_map, ctm, consistency, reflow: weight of each time; uniform unless told. reflow: uniform or "
        "learned, as the others are of errors of x_0.",
    )
    schedule: tuple[int, ...] | None = Field(
        None,
        description="Numbers of steps: of each stage of progressive, or that students of the others are saved to "
        "serve. progressive and reflow: 8 4 2 1 unless told; others: all up to 8 that the stored states have.",
    )
    target_ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay of the average that makes targets; ctm 0.999, consistency 0.95.",
    )
    denoising_weight: float | None = Field(None, ge=0, description="ctm: weight of its denoising term; 1 unless told.")
    regression: float | None = Field(
        None, ge=0, description="dmd: weight of the distance to the stored outputs; 0.25 unless told, 0 in DMD2."
    )
    gan: float | None = Field(
        None, ge=0, description="dmd: weight of DMD2's discriminator on the critic's features; 0 (none) unless told."
    )
    a: float | None = Field(None, description="sid: the alpha of its loss, 1.0 or 1.2; 1.2 unless told.")
    critic_steps: int | None = Field(
        None, ge=1, description="dmd, vsd, sid: the critic's updates before each of the student's; 1 unless told."
    )
    student_steps: int | None = Field(
        None, ge=1, description="dmd, vsd, sid: steps of the student, with fresh noise between them; 1 unless told."
    )
    t_range: tuple[float, float] | None = Field(
        None, description="dmd, vsd, sid: share of the noise levels that is drawn from; 0.02 0.98 unless told."
    )
    guidance: float | None = Field(
        None, description="dmd, vsd, sid: guidance scale of the real score; the recipe's unless told."
    )
    label_dropout: float | None = Field(
        None, ge=0, le=1, description="denoising: share of labels replaced by the null label; 0.1 unless told."
    )
    p_mean: float | None = Field(None, description="denoising with process ve: mean of log sigma; -1.2 unless told.")
    p_std: float | None = Field(None, gt=0, description="denoising with process ve: std of log sigma; 1.2 unless told.")

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        own = _OBJECTIVE_DEFAULTS[self.name]
        for option in ObjectiveConfig.model_fields.keys() - own.keys() - {"name"}:
            if getattr(self, option) is not None:
                owners = ", ".join(name for name, options in _OBJECTIVE_DEFAULTS.items() if option in options)
                raise ValueError(f"objective.{option} means nothing to {self.name}; it belongs to {owners}")
        self._check_distance("pseudo_huber", "c", needed="its width: --objective.c 0.1")
        self._check_distance("lpips", "lpips", needed="its TorchScript file: --objective.lpips FILE (see --help)")
        if self.name == "reflow" and self.weighting in ("snr", "truncated_snr"):
            told = f"objective.weighting {self.weighting} is one of errors of x_0"
            raise ValueError(f"{told}, reflow's are of velocities; use uniform or learned")
        self._check_numbers()
        return self

    def _check_distance(self, distance: str, option: str, *, needed: str) -> None:
        """Refuse a distance without the option that belongs to it, and the option without the distance."""
        value = getattr(self, option)
        if self.distance == distance and value is None:
            raise ValueError(f"objective.distance {distance} needs {needed}, or choose l2")
        if self.distance != distance and value is not None:
            way = f"add --objective.distance {distance}, or leave it out"
            raise ValueError(f"objective.{option} {value} belongs to distance {distance}; {way}")

    def _check_numbers(self) -> None:
        if self.schedule is not None:
            halves = all(longer == 2 * shorter for longer, shorter in pairwise(self.schedule))
            if not self.schedule or min(self.schedule) < 1 or not halves:
                raise ValueError(f"objective.schedule {list(self.schedule)} does not halve; write one such as 8 4 2 1")
        if self.t_range is not None and not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"objective.t_range {list(self.t_range)}: give two shares in [0, 1] that ascend")

    def filled(self) -> "ObjectiveConfig":
        """With the objective's own defaults where nothing is said."""
        defaults = _OBJECTIVE_DEFAULTS[self.name].items()
        return self.model_copy(update={key: value for key, value in defaults if getattr(self, key) is None})
