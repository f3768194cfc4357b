"""An objective: its loss, its options, the stages of a fit on it, and its defaults of a fit.

Each objective is one file of this folder, from its equation to its `KIND`, and one row of table.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import ConfigDict
from torch import Tensor

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.dataset import Dataset
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.stream import Batch

Times = tuple[float, ...]


class Objective(Protocol):
    """(networks, batch) -> scalar loss of the student. Batch states are float32 [B, ...]; times are float64."""

    @property
    def columns(self) -> tuple[str, ...]:
        """State columns that it reads."""

    @property
    def num_uniforms(self) -> int:
        """Numbers in (0, 1) that it uses of each sample."""

    def __call__(self, networks: Networks, batch: Batch) -> Tensor:
        """The mean over the batch."""


@runtime_checkable
class AlternatingObjective(Objective, Protocol):
    """An objective whose student learns from a critic, which itself learns from the student's samples."""

    @property
    def critic_steps(self) -> int:
        """Updates of the critic before each of the student's."""

    def critic_loss(self, networks: Networks, batch: Batch) -> Tensor:
        """The mean over the batch of the critic's own loss."""


@dataclass(frozen=True)
class Stage:
    """A run of optimizer steps on one objective.

    times: the grid on which its student is validated, if any. grids: the grids that its student is saved to serve, by
    their number of steps; default: that of `times`. sampling: how it makes several steps. reads: digests of what the
    objective reads beside the store. notes: what the user should know of that, a line each.
    """

    name: str
    objective: Objective
    times: Times = ()
    grids: dict[int, Times] = field(default_factory=dict)
    sampling: Literal["jump", "renoise"] = "jump"
    reads: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def served(self) -> dict[int, Times]:
        """The grids that its student is saved with."""
        return self.grids or ({len(self.times) - 1: self.times} if self.times else {})


class Options(Config):
    """Options of one objective, each with its default; what a fit asks of every objective is a property."""

    model_config = ConfigDict(allow_inf_nan=False)

    @property
    def target_decay(self) -> float | None:
        """Decay of the average of the student that makes targets; None for no such average."""
        return None

    @property
    def student_every(self) -> int:
        """The student is updated at every so many steps; at the others its critic alone is."""
        return 1

    @property
    def has_discriminator(self) -> bool:
        return False

    @property
    def real_guidance(self) -> float | None:
        """Guidance scale of the teacher's score; None for that of the data."""
        return None

    @property
    def learns_weighting(self) -> bool:
        return False

    @property
    def distance_file(self) -> str | None:
        """A file beside the store that holds a distance's network."""
        return None


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class Given:
    """The data that an objective is built on. dataset: trajectories or segments, None for one that reads images alone.

    images: URI of real images, if any. seed: for every random choice.
    """

    sample_shape: tuple[int, ...]
    seed: int
    dataset: Dataset | None = None
    images: str | None = None

    @property
    def stored(self) -> Dataset:
        assert self.dataset is not None
        return self.dataset


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[OptionsT]):
    """An objective by name: its options, its stages, and what it wants of a fit.

    stages: raises ManifestMismatch where the dataset lacks states, ValueError for options that don't go with it.
    fit: its defaults of fit's options; they begin from the teacher, with a cosine decay and an average of the weights.
    process: the student's own process, if not the teacher's. check: raises ValueError for options of a fit.
    """

    options: type[OptionsT]
    stages: Callable[[OptionsT, Given], tuple[Stage, ...]]
    makes: str
    """What it fits, for `--help`."""
    learns: str
    """What the student learns, with the paper, for the README."""
    reads: str
    samples: str
    """How the student samples."""
    fit: Mapping[str, Any] = field(default_factory=dict)
    takes_target_time: bool = False
    """Its student takes the time that it jumps to."""
    has_critic: bool = False
    """It needs the teacher's network and a critic beside the student."""
    through_teacher: bool = False
    """Its gradients lead through the teacher."""
    process: Mapping[str, Any] | None = None
    reads_images: bool = False
    """It reads real images, not a store."""
    reads_segments: bool = False
    """It reads segments of progressive distillation too."""
    judged_by_holdout: bool = True
    """Its student is to reproduce stored outputs: the error on the holdout says how well."""

    @property
    def fit_defaults(self) -> dict[str, Any]:
        return {"init": "teacher", "decay": "cosine", "ema": 0.999, "lr": 1e-3, "beta1": 0.9} | dict(self.fit)
