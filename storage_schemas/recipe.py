"""The recipe: everything that changes a number. Its digest names the folder, so nothing stale is taken for new."""

from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from limbeck.storage_schemas import paths, record
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.names import Count, Positive, Samples, Sha256, Text
from limbeck.storage_schemas.record import StorageDtype

Dimension = Annotated[int, Field(ge=1, le=2**31 - 1)]


class TeacherRecord(Document):
    """The teacher that was solved: where it came from, what its weights hash to, and how to build it."""

    uri: Text
    weights_sha256: Sha256
    model: dict[str, Any]
    source_sha256: Sha256 | None = None

    def difference(
        self, source: str, *, model: dict[str, Any], weights_sha256: str, source_sha256: str | None
    ) -> str | None:
        """How the model at `source` is another than this teacher, in one line: by its weights, description or code."""
        for what, here, there in (
            ("weights", weights_sha256, self.weights_sha256),
            ("description", digest(model), digest(self.model)),
            ("source code", source_sha256, self.source_sha256),
        ):
            if here != there:
                return f"{source} has {what} {str(here)[:12]}, the recipe says {str(there)[:12]}"
        return None


class Guidance(Document):
    """Classifier-free guidance. `scale` 1 is the conditional model in this convention.

    Of several scales each sample has one, a pure function of (seed, split, id): guidance_scales of diffusion/noise.py.
    """

    scale: float | tuple[float, ...] = 1.0
    convention: Literal["mu_uncond + scale * (mu_cond - mu_uncond)"] = "mu_uncond + scale * (mu_cond - mu_uncond)"

    @model_validator(mode="after")
    def _scales_ascend(self) -> Self:
        if isinstance(self.scale, tuple) and (len(self.scale) < 2 or list(self.scale) != sorted(set(self.scale))):
            raise ValueError(f"guidance scales {list(self.scale)}: give two or more that ascend, or one as a number")
        return self

    @property
    def scales(self) -> tuple[float, ...]:
        """All scales that occur."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def is_plain(self) -> bool:
        """Whether every sample is the conditional model's own, which needs no call without the condition."""
        return self.scales == (1.0,)

    @property
    def as_words(self) -> str:
        """The scales as a text: 2, or 1, 2, 4."""
        return ", ".join(f"{scale:g}" for scale in self.scales)


class SolverRecord(Document):
    """Solver, number of steps, the frame it works in and the options that made the grid."""

    name: Text
    steps: Positive
    frame: Literal["sigma", "flow"]
    grid: dict[str, Any]

    @model_validator(mode="after")
    def _grid_has_a_name(self) -> Self:
        if not isinstance(self.grid.get("name"), str):
            raise ValueError("the grid has no name")
        return self


class PriorStart(Document):
    """Chains start from x_T of the prior."""

    kind: Literal["prior"] = "prior"


class DataStart(Document):
    """Chains start from noised images: those of a source's train split, and the digest of their pixels and labels."""

    kind: Literal["data"] = "data"
    images: Text
    digest: Sha256


class NoCondition(Document):
    """An unconditional teacher; the column holds -1."""

    kind: Literal["none"] = "none"


class UniformLabels(Document):
    """Labels drawn uniformly from 0..num_classes-1 by the sample id."""

    kind: Literal["uniform_labels"] = "uniform_labels"
    num_classes: Positive


class DataLabels(Document):
    """The labels of the images that chains start from, of a teacher with so many classes."""

    kind: Literal["data_labels"] = "data_labels"
    num_classes: Positive


class NoiseRecord(Document):
    """The counter-based generator of everything random about a sample."""

    algorithm: Text
    version: Count
    seed: Count


Start = Annotated[PriorStart | DataStart, Field(discriminator="kind")]
Condition = Annotated[NoCondition | UniformLabels | DataLabels, Field(discriminator="kind")]


class Recipe(Document):
    """x_T -> stored states. times, alphas and sigmas are the grid t_0 = T > ... > t_N = 0 in float64, [N + 1] each."""

    teacher: TeacherRecord
    guidance: Guidance = Guidance()
    solver: SolverRecord
    times: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    states: tuple[Count, ...]
    start: Start = PriorStart()
    condition: Condition = NoCondition()
    noise: NoiseRecord
    chain: Literal["trajectory", "segment"] = "trajectory"
    sample_shape: Annotated[tuple[Dimension, ...], Field(min_length=1, max_length=8)]
    storage_dtype: StorageDtype = "float16"
    solve_dtype: Literal["float32", "float64"] = "float32"
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    tf32: bool = False
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    channels_last: bool = False
    micro_batch: Samples
    numerics_version: Count

    @model_validator(mode="after")
    def _grid_is_one_grid(self) -> Self:
        points = self.solver.steps + 1
        for name in ("times", "alphas", "sigmas"):
            have = len(getattr(self, name))
            if have != points:
                raise ValueError(f"{name} has {have} points, {self.solver.steps} steps need {points}")
        if any(later >= earlier for earlier, later in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("times must descend from T to 0")
        return self

    @model_validator(mode="after")
    def _states_are_on_the_grid(self) -> Self:
        if list(self.states) != sorted(set(self.states)):
            raise ValueError(f"states {list(self.states)} must ascend without repeats")
        if self.chain == "trajectory" and (self.states[:1], self.states[-1:]) != ((0,), (self.num_steps,)):
            raise ValueError(f"states {list(self.states)} of a trajectory begin with 0 and end with {self.num_steps}")
        return self

    @model_validator(mode="after")
    def _segments_lie_on_the_grid(self) -> Self:
        if self.start.kind == "data" and self.chain != "segment":
            raise ValueError("chains that start from data are segments: a trajectory starts from the prior")
        if self.chain == "segment" and (self.num_steps % 2 or self.states):
            problem = f"segments of two steps on a grid of {self.num_steps}, states {list(self.states)}"
            raise ValueError(f"{problem}: give an even number of steps and no states, which are the segment's own")
        return self

    @cached_property
    def id(self) -> str:
        """sha256 of the canonical JSON."""
        return digest(self.plain())

    @property
    def own_paths(self) -> tuple[str, ...]:
        """One path, by its digest."""
        return (paths.recipe_path(self.id),)

    @property
    def num_steps(self) -> int:
        """N, the grid's last index."""
        return self.solver.steps

    @property
    def fields(self) -> tuple[record.Field, ...]:
        """The columns of a shard."""
        if self.chain == "segment":
            return record.segment_fields(self.sample_shape, self.storage_dtype)
        return record.trajectory_fields(self.sample_shape, self.storage_dtype, self.num_steps, self.states)

    @property
    def sample_bytes(self) -> int:
        """Bytes of all columns of a sample, uncompressed."""
        return sum(field.nbytes for field in self.fields)
