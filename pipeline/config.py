"""What each command of `python -m pipeline` can be told."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from tyro.conf import Positional, arg

from storage_schemas.command_line import Config

DatasetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="name of the dataset in the store")]


class SolverConfig(Config):
    """Which solver, over which grid."""

    name: Literal["ddim", "heun", "rk4", "ab2", "dpmpp_2m", "dpmpp_3m"] = Field(
        "heun", description="ddim (= Euler), heun, rk4, ab2, dpmpp_2m or dpmpp_3m"
    )
    steps: int = Field(16, ge=1, description="steps N of the grid t_0 = T > ... > t_N = 0")
    grid: Literal["karras", "uniform_time", "uniform_logsnr"] = Field("karras", description="how the times are spaced")
    rho: float | None = Field(None, gt=0, description="karras: how strongly low noise levels are favoured; 7 if unset")
    r_max: float | None = Field(
        None, gt=0, description="karras, uniform_logsnr: first sigma/alpha; the process's own if unset"
    )
    r_min: float | None = Field(
        None, gt=0, description="karras, uniform_logsnr: last sigma/alpha before 0; 0.002 if unset, or a table's first"
    )
    t_min: float | None = Field(None, gt=0, description="uniform_time: last time before 0; evenly spaced if unset")


class RayConfig(Config):
    """Where Ray is and what a worker takes of it."""

    address: str | None = Field(None, description="a running cluster; else RAY_ADDRESS, else one is started here")
    num_cpus: float = Field(1.0, ge=0, description="CPUs a worker takes")
    num_gpus: float = Field(0.0, ge=0, description="GPUs a worker takes; a fraction lets several share one")


class GenerateConfig(Config):
    """Solve the teacher's trajectories that a dataset is missing, and seal them as its next manifest."""

    teacher: str = Field(description="builtin:NAME, diffusers:SOURCE, python:MODULE:FACTORY, or a saved model")
    store: str = Field(description="where the dataset lies: a folder, s3://, gs:// or az://")
    dataset: DatasetName = "main"
    count: int = Field(ge=1, description="train samples that the window holds at least")
    holdout: int = Field(2048, ge=0, description="holdout samples that the window holds at least")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every noise and label")
    solver: SolverConfig = SolverConfig()
    guidance: float = Field(1.0, description="classifier-free guidance scale; 1 is the conditional model itself")
    states: tuple[int, ...] = Field((), description="inner grid indices to store; noise (0) and output (N) always are")
    condition: Literal["auto", "none", "uniform_labels"] = Field(
        "auto", description="labels: uniform where the teacher has classes (auto), none, or uniform"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="what states are stored as")
    solve_dtype: Literal["float32", "float64"] = Field("float32", description="what states are solved in")
    autocast: Literal["none", "bfloat16", "float16"] = Field("none", description="the network's own precision")
    tf32: bool = Field(False, description="allow TF32 matrix products on GPUs")
    compile: bool = Field(False, description="torch.compile the teacher")
    format: Literal["parquet", "webdataset"] = Field("parquet", description="file format of shards")
    compression: Literal["none", "zstd"] = Field("none", description="of parquet shards")
    samples_per_shard: int = Field(2048, ge=1, description="samples in a shard, which is one task")
    micro_batch: int = Field(256, ge=1, description="samples solved together; part of the recipe")
    with_weights: bool = Field(False, description="keep the teacher's weights in the store, for students to start from")
    single_writer: bool = Field(False, description="allow storage without conditional create; one job at a time")
    max_missing: int = Field(0, ge=0, description="tasks that may stay missing in a sealed manifest")
    max_attempts: int = Field(3, ge=1, description="tries of a task before it is set aside")
    runner: Literal["ray", "local"] = Field("ray", description="ray, or processes on this machine")
    workers: int = Field(1, ge=1, description="workers, each with a teacher of its own")
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$", description="auto, cpu, cuda, cuda:1, ..."
    )
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _states_are_on_the_grid(self) -> Self:
        past = [index for index in self.states if not 0 <= index <= self.solver.steps]
        if past:
            raise ValueError(
                f"state {past[0]} is not on a grid of {self.solver.steps} steps: give indices from 1 to "
                f"{self.solver.steps - 1}, or more steps"
            )
        return self

    @model_validator(mode="after")
    def _shards_hold_whole_micro_batches(self) -> Self:
        if self.samples_per_shard % self.micro_batch:
            raise ValueError(
                f"micro-batch {self.micro_batch} does not divide {self.samples_per_shard} samples per shard: "
                "choose one that does"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if self.format == "webdataset" and self.compression != "none":
            raise ValueError("webdataset shards are not compressed: drop compression, or use format parquet")
        if self.store.startswith("memory://") and (self.runner, self.workers) != ("local", 1):
            raise ValueError("a memory:// store lives in one process: use runner local with 1 worker, or another store")
        if self.guidance != 1 and self.condition == "none":
            raise ValueError(f"guidance {self.guidance} needs labels: leave guidance at 1, or condition at auto")
        return self


class RegenerateConfig(GenerateConfig):
    """Slide the train window: solve some new trajectories, drop as many of the oldest, seal the next manifest."""

    refresh: float = Field(0.1, gt=0, le=1, description="share of the train window that is new; as much is dropped")


PrintJson = Annotated[bool, arg(name="json"), Field(description="print JSON")]
StoreArgument = Annotated[Positional[str], Field(description="the store's URI")]


class StatusConfig(Config):
    """Progress of the newest job, running or dead, read from the store alone."""

    store: StoreArgument
    job: str | None = Field(None, description="a job's id; the newest by default")
    as_json: PrintJson = False


class VerifyConfig(Config):
    """Check every byte of a dataset against its checksum, and every id against the manifest."""

    store: StoreArgument
    dataset: DatasetName = "main"
    manifest: int | None = Field(None, ge=1, description="number of a manifest; the latest by default")
    as_json: PrintJson = False


class InspectConfig(Config):
    """What is in a dataset: its recipe, counts, sizes, labels and statistics."""

    store: StoreArgument
    dataset: DatasetName = "main"
    manifest: int | None = Field(None, ge=1, description="number of a manifest; the latest by default")
    as_json: PrintJson = False
    picture: str | None = Field(None, description="PNG file for a picture of a few trajectories")
