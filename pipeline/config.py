"""Options of each command of `python -m limbeck.pipeline`."""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from tyro.conf import Positional, arg

from limbeck.diffusion.grids import GRIDS, ONE_NUMBER_OF_STEPS
from limbeck.diffusion.models.schedulers import Ignorable
from limbeck.diffusion.solvers import SOLVERS
from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.commit import MOST_QUARANTINED
from limbeck.storage_schemas.images import KINDS
from limbeck.storage_schemas.layout import CompressionName, FormatName, check_compression
from limbeck.storage_schemas.places import LocalName, Source, StorePlace, source

DatasetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the dataset in the store.")]


MOST_HOLDOUT = 2048
"""More holdout samples are made only where they are asked for."""

DURATION_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def duration(text: str) -> timedelta:
    """90m, 20h, 7d -> a length of time."""
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if match is None:
        raise ValueError(f"{text!r} is no length of time: write minutes, hours or days such as 90m, 20h, 7d")
    return timedelta(**{DURATION_UNITS[match[2]]: int(match[1])})


def _is_duration(text: str) -> str:
    duration(text)
    return text


Duration = Annotated[str, AfterValidator(_is_duration)]


def _is_tick(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z:._-]{0,63}", text):
        raise ValueError(f"{text!r} is no tick: write the schedule's time in letters, digits and :._- as 2026-11-22T03")
    return text


Tick = Annotated[str, AfterValidator(_is_tick)]


def _ascending(scales: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(scales)) < len(scales):
        given = " ".join(map(str, scales))
        raise ValueError(f"{given} names a scale twice: each scale has as many samples as any other, name it once")
    return tuple(sorted(scales))


Scales = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False)], ...],
    BeforeValidator(lambda given: given if isinstance(given, list | tuple) else (given,)),
    Field(min_length=1),
    AfterValidator(_ascending),
]
PrintJson = Annotated[bool, arg(name="json"), Field(description="Print JSON.")]
StoreArgument = Annotated[Positional[StorePlace], Field(description="URI of the store.")]

MicroBatch = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"] | None,
    Field(
        description="Samples solved together, part of the recipe; auto: as many as a worker has memory for. Default: "
        "as in the dataset, else the most up to 256 that divide a shard."
    ),
]
ChainStart = Annotated[
    str,
    Field(
        pattern=r"^(prior|data:.+)$",
        description="What is solved. prior: trajectories from noise; data:IMAGES: segments of two ddim steps from "
        "noised real images, such as data:sklearn:digits.",
    ),
    AfterValidator(source),
]
if TYPE_CHECKING:
    SolverName = str
    GridName = str
else:
    SolverName = Literal[tuple(SOLVERS)]
    GridName = Literal[(*GRIDS, "scheduler", "own")]


_GRID, _STEPS = "karras", 16


class GridConfig(Config):
    """How the times of a solve are spaced."""

    grid: GridName = Field(
        _GRID,
        description="Spacing of the times. trailing, leading, linspace: a pipeline's whole timesteps; times: as given; "
        "scheduler: the pipeline's own; own: the grid that the teacher, a student, was fitted for.",
    )
    rho: float | None = Field(None, gt=0, description="Grid karras: how strongly low noise is favoured. Default: 7.")
    r_max: float | None = Field(
        None, gt=0, description="Grids karras, uniform_logsnr: first sigma/alpha. Default: the process's own."
    )
    r_min: float | None = Field(
        None, gt=0, description="Grids karras, uniform_logsnr: last sigma/alpha before 0. Default: 0.002, or a table's."
    )
    t_min: float | None = Field(
        None, gt=0, description="Grid uniform_time: last time before 0. Default: evenly spaced."
    )
    shift: float | None = Field(
        None, gt=0, description="Grid uniform_time: shift towards high noise, as SD3's. Default: 1, none."
    )
    mu: float | None = Field(None, description="Grid uniform_time: log(shift), as Flux's pipelines have it.")
    offset: int | None = Field(None, ge=0, description="Grid leading: steps_offset of the scheduler. Default: 0.")
    end: Literal[0, 1] | None = Field(
        None, description="Grids of whole timesteps: last time; 1 where set_alpha_to_one is false. Default: 0, data."
    )
    spare: Literal[0, 1] | None = Field(
        None,
        description="Grids leading, linspace: 1 for a point more that is left out, as DPM-Solver has it. Default: 0.",
    )
    times: tuple[float, ...] | None = Field(
        None, min_length=2, description="Grid times: every time, descending, one more than the steps."
    )

    @model_validator(mode="before")
    @classmethod
    def _follow_times(cls, given: Any) -> Any:
        """Times that are given are the grid, in place of the default one."""
        follows = isinstance(given, Mapping) and given.get("times") and given.get("grid") in (None, _GRID)
        return {**given, "grid": "times"} if follows else given

    @model_validator(mode="after")
    def _one_shift(self) -> Self:
        if self.shift is not None and self.mu is not None:
            raise ValueError(f"shift {self.shift} and mu {self.mu} say the same: leave one of the two out")
        return self

    @property
    def has_any_steps(self) -> bool:
        """Whether the grid is one of any number of steps."""
        return self.grid not in ONE_NUMBER_OF_STEPS


class SolverConfig(GridConfig):
    """Which solver, over which grid."""

    name: SolverName | None = Field(
        None, description=f"One of {', '.join(SOLVERS)}; ddim is Euler. Default: heun, for segments ddim."
    )
    steps: int = Field(_STEPS, ge=1, description="Steps N of the grid t_0 = T > ... > t_N = 0; as many as times has.")

    @model_validator(mode="before")
    @classmethod
    def _count_times(cls, given: Any) -> Any:
        """As many steps as the times that are given have, in place of the default number."""
        times = given.get("times") if isinstance(given, Mapping) else None
        return {**given, "steps": len(times) - 1} if times and given.get("steps") in (None, _STEPS) else given


class RayConfig(Config):
    """Where Ray is and what a worker takes of it."""

    address: str | None = Field(None, description="A running cluster. Default: RAY_ADDRESS, else one is started here.")
    num_cpus: float = Field(1.0, ge=0, description="CPUs that a worker takes.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs that a worker takes; a fraction lets several share one.")
    min_workers: int = Field(1, ge=1, description="Workers that must be ready within startup-timeout.")
    startup_timeout: float = Field(900.0, gt=0, description="Seconds that a job waits for room on the cluster.")


class TeacherConfig(Config):
    """Whose samples, and in which numbers they are computed."""

    teacher: Source = Field(description="A builtin:NAME, diffusers:SOURCE, python:MODULE:FACTORY, or a saved model.")
    ignore: tuple[Ignorable, ...] = Field(
        (), description="Settings of a pipeline's scheduler that no ODE has, to leave out: clip_sample, thresholding."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every noise and label.")
    guidance: Scales = Field(
        (1.0,),
        description="Scale of classifier-free guidance; 1 is the conditional model. With several, each sample has one.",
    )
    condition: Literal["auto", "none", "uniform_labels"] = Field(
        "auto",
        description="Labels: auto, uniform where the teacher has classes; none; or uniform_labels. Segments that start "
        "from data have those of their images.",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Type that states are stored in.")
    solve_dtype: Literal["float32", "float64"] = Field("float32", description="Type that states are solved in.")
    autocast: Literal["none", "bfloat16", "float16"] = Field("none", description="Precision inside of the network.")
    tf32: bool = Field(False, description="Allow TF32 matrix products on GPUs.")
    compile: Literal["none", "default", "reduce-overhead"] = Field(
        "none", description="Mode of torch.compile for the teacher; reduce-overhead: CUDA graphs, on a CPU as default."
    )
    channels_last: bool = Field(False, description="Images in channels-last memory, which convolutions on GPUs prefer.")

    @model_validator(mode="after")
    def _guidance_has_labels(self) -> Self:
        if self.guidance != (1.0,) and self.condition == "none":
            given = " ".join(map(str, self.guidance))
            raise ValueError(f"guidance {given} needs labels: leave guidance at 1, or condition at auto")
        return self


class WorkerConfig(Config):
    """Where a worker runs and what it has."""

    runner: Literal["ray", "local"] = Field("ray", description="Ray, or processes on this machine.")
    threads: int = Field(1, ge=1, description="CPU threads of each worker.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$", description="Device: auto, cpu, cuda, cuda:1, and so on."
    )
    ray: RayConfig = RayConfig()


class JobConfig(WorkerConfig):
    """Where samples go, how many, and what a job does on its way there."""

    store: StorePlace = Field(description="Where the dataset lies: a folder, s3://, gs:// or az://.")
    count: int = Field(ge=1, description="Train samples that the window holds at least.")
    holdout: int | None = Field(
        None,
        ge=0,
        description="Holdout samples that the window holds at least. Default: an eighth of count, but 2 at least and "
        "2048 at most.",
    )
    format: FormatName | None = Field(
        None, description="File format of shards. Default: as in the dataset, else parquet."
    )
    compression: CompressionName | None = Field(
        None, description="Compression of parquet shards. Default: as in the dataset, else none."
    )
    samples_per_shard: int | None = Field(
        None,
        ge=1,
        description="Samples in a shard, which is one task. Default: as in the dataset, else a power of two for 256 "
        "MiB, at most 2048, or whole micro-batches of a given size.",
    )
    micro_batch: MicroBatch = None
    single_writer: bool = Field(False, description="Allow storage without conditional create; one job at a time.")
    recheck: bool = Field(
        False, description="Look up every listed shard, and make again what is lost or holds quarantined samples."
    )
    max_missing: int = Field(0, ge=0, description="Tasks that may stay missing in a sealed manifest.")
    max_quarantined: float = Field(
        MOST_QUARANTINED,
        ge=0,
        le=1,
        description="Share of the samples that may be left out as not finite.",
    )
    max_attempts: int = Field(3, ge=1, description="Tries of a task before it is set aside.")
    straggler_seconds: float | None = Field(
        None, gt=0, description="Deadline of a task. Default: 20 times the median task, and 600 s at least."
    )
    drain_seconds: float = Field(25.0, ge=0, description="Seconds that SIGTERM leaves to the tasks in flight.")
    workers: int | None = Field(
        None, ge=1, description="Workers at most, each with a teacher of its own. Default: 1, or ray.min-workers."
    )
    as_json: PrintJson = False

    @property
    def num_holdout(self) -> int:
        """Holdout samples that are asked for."""
        return max(2, min(self.count // 8, MOST_HOLDOUT)) if self.holdout is None else self.holdout

    @property
    def num_workers(self) -> int:
        """Workers at most."""
        return self.workers or (self.ray.min_workers if self.runner == "ray" else 1)

    @model_validator(mode="after")
    def _shards_hold_whole_micro_batches(self) -> Self:
        size, together = self.samples_per_shard, self.micro_batch
        if size and isinstance(together, int) and size % together:
            raise ValueError(f"micro-batch {together} does not divide {size} samples per shard: choose one that does")
        return self

    @model_validator(mode="after")
    def _enough_workers_are_asked_for(self) -> Self:
        if self.workers and self.ray.min_workers > self.workers:
            raise ValueError(f"ray.min-workers {self.ray.min_workers} is more than workers {self.workers}: lower it")
        return self

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if self.format and self.compression:
            check_compression(self.format, self.compression)
        if self.store.startswith("memory://") and (self.runner, self.num_workers) != ("local", 1):
            raise ValueError("a memory:// store lives in one process: use runner local with 1 worker, or another store")
        return self


class GenerateConfig(JobConfig, TeacherConfig):
    """Solve the teacher's trajectories that a dataset is missing, and seal them as its next manifest."""

    dataset: DatasetName = "main"
    solver: SolverConfig = SolverConfig()
    states: tuple[int, ...] = Field((), description="Inner grid indices to store; noise (0) and output (N) always are.")
    start: ChainStart = "prior"
    calibration: LocalName | None = Field(
        None, description="JSON that calibrate wrote: checked against the recipe and kept among its notes."
    )
    with_weights: bool = Field(False, description="Keep the teacher's weights in the store, to start students from.")
    new_recipe: bool = Field(False, description="Begin a new window where the dataset holds another recipe.")

    @property
    def solver_name(self) -> SolverName:
        """Which solver it is."""
        return self.solver.name or ("heun" if self.start == "prior" else "ddim")

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
    def _segments_are_two_steps_of_ddim(self) -> Self:
        if self.start == "prior":
            return self
        if (self.solver_name, self.solver.steps % 2) != ("ddim", 0):
            raise ValueError(
                f"start {self.start} makes segments of two ddim steps, this is {self.solver_name} on "
                f"{self.solver.steps}: use --solver.name ddim with an even number of steps"
            )
        if self.states or self.calibration:
            raise ValueError(f"start {self.start} stores three states a segment: leave --states and --calibration out")
        return self


class PlanConfig(GenerateConfig):
    """What generate would do and what it would cost, from a handful of samples timed on one worker; writes nothing."""

    time_batches: int = Field(3, ge=1, description="Micro-batches that are timed, after one to warm up.")
    probe_store: bool = Field(
        False, description="Time the upload of one shard too, which is removed again; without it, uploads take no time."
    )
    price_gpu_hour: float | None = Field(
        None, ge=0, description="Price of an hour of one GPU, or of one CPU where workers have no GPU."
    )
    price_gb_month: float | None = Field(None, ge=0, description="Price of a gigabyte (10^9 bytes) for a month.")


class CalibrateConfig(WorkerConfig, TeacherConfig):
    """Measure each solver's error at a range of steps, and name the cheapest under a tolerance."""

    tolerance: float = Field(
        0.01, gt=0, description="Largest error: RMS of a coordinate, in standard deviations of the data."
    )
    solvers: Annotated[tuple[SolverName, ...], Field(min_length=1, description="Solvers to measure.")] = tuple(SOLVERS)
    steps: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="Numbers of steps to measure each at.")
    ] = (4, 6, 8, 12, 16, 24, 32, 48, 64)
    count: int = Field(64, ge=8, description="Samples that the error is measured on: the holdout's first noises.")
    solver: GridConfig = GridConfig()
    reference_factor: int | None = Field(
        None,
        ge=2,
        description="Steps of the reference, by rk4, over the most steps. Default: 8, or more up to 512 steps.",
    )
    micro_batch: int = Field(64, ge=1, description="Samples solved together.")
    out: LocalName | None = Field(None, description="JSON file for the measurement, for generate --calibration.")
    picture: LocalName | None = Field(None, description="PNG file for a plot of error against network calls.")
    as_json: PrintJson = False

    @model_validator(mode="after")
    def _grids_have_any_number_of_steps(self) -> Self:
        if not self.solver.has_any_steps:
            raise ValueError(f"solver.grid {self.solver.grid} has one number of steps; calibrate on another grid")
        return self


class RegenerateConfig(GenerateConfig):
    """Move a dataset's window on by a policy, for schedules: safe to overlap and to run for every missed tick."""

    policy: Literal["grow", "refresh", "recipe"] = Field(
        "refresh", description="What is done with the train window: grow it, slide it, or take a changed recipe up."
    )
    refresh: float = Field(0.1, gt=0, le=1, description="Policy refresh: the new share of the window; as much goes.")
    grow_by: int = Field(
        0, ge=0, description="Policy grow: train samples added each time, besides what count asks for."
    )
    max_age: Duration | None = Field(
        None, description="Policies grow and refresh: do nothing while the train window is younger, such as 20h or 7d."
    )
    tick: Tick | None = Field(
        None, description="Time of the schedule, such as 2026-11-22T03: served once; a later one serves it too."
    )

    @model_validator(mode="after")
    def _options_fit_the_policy(self) -> Self:
        if self.new_recipe:
            raise ValueError("new-recipe is for generate: regenerate goes over to another recipe with --policy recipe")
        if self.grow_by and self.policy != "grow":
            raise ValueError(f"grow-by {self.grow_by} needs --policy grow, this is {self.policy}")
        if self.max_age and self.policy == "recipe":
            raise ValueError("max-age is for --policy grow and refresh: policy recipe acts when the recipe changes")
        return self


class PruneConfig(Config):
    """Delete what nothing refers to: sweep what the last floor allows, then set the next one."""

    store: StoreArgument
    keep_manifests: int = Field(3, ge=1, description="Newest manifests of each dataset that stay served.")
    grace: Duration = Field("7d", description="Time from setting a floor to the first prune that may delete below it.")
    dry_run: bool = Field(
        False, description="List what would be deleted now, and what a new floor would allow; write nothing."
    )
    as_json: PrintJson = False


class SubmitConfig(Config):
    """Submit the `generate` or `regenerate` after -- to a Ray cluster's job server, never the same one twice."""

    command: Annotated[
        Positional[tuple[str, ...]], Field(description="The command: -- generate ..., or -- regenerate ....")
    ]
    dashboard: str = Field("http://127.0.0.1:8265", description="Address of the cluster's job server.")
    working_dir: StorePlace | None = Field(
        None,
        description="A folder that the job runs in, copied to the cluster by Ray; a clone of limbeck runs its code.",
    )
    wait: bool = Field(False, description="Wait for the job's end, show its output and end with its exit code.")
    dry_run: bool = Field(False, description="Print the submission id and the command, submit nothing.")
    as_json: PrintJson = False


class ParityConfig(Config):
    """Compare a pipeline's own scheduler with our solve of it: the same noise, the same times, step by step."""

    teacher: Source = Field(description="A pipeline, diffusers:SOURCE.")
    ignore: tuple[Ignorable, ...] = Field((), description="As of generate: clip_sample, thresholding.")
    solver: SolverName = Field("ddim", description="Solver whose steps diffusers has too: ddim, dpmpp_2m, unipc.")
    steps: int = Field(20, ge=1, description="Steps of the scheduler's own grid.")
    guidance: float = Field(1.0, description="Scale of classifier-free guidance; 1 is the conditional model.")
    count: int = Field(4, ge=1, description="Samples that are solved.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of their noise.")
    tolerance: float = Field(1e-3, gt=0, description="Largest difference that is allowed, in units of a state's rms.")
    device: str = Field("auto", description="Device: auto, cpu, cuda, cuda:1, and so on.")
    as_json: PrintJson = False


class StatusConfig(Config):
    """Progress of the newest job, running or dead, read from the store alone."""

    store: StoreArgument
    job: str | None = Field(None, description="Id of a job. Default: the newest.")
    as_json: PrintJson = False


class ResolveConfig(Config):
    """Samples of a dataset solved again: by which teacher, and where."""

    store: StoreArgument
    dataset: DatasetName = "main"
    manifest: int | None = Field(None, ge=1, description="Number of a manifest. Default: the latest.")
    teacher: Source | None = Field(
        None, description="The recipe's teacher. Default: what the store keeps, else the recipe's URI."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$", description="Device: auto, cpu, cuda, cuda:1, and so on."
    )
    threads: int = Field(1, ge=1, description="CPU threads of the solve.")
    runner: Literal["ray", "local"] = Field("local", description="Where to solve: a process here, or a worker on Ray.")
    ray: RayConfig = RayConfig()
    as_json: PrintJson = False


class VerifyConfig(ResolveConfig):
    """Check every byte of a dataset against its checksum, and every id against the manifest; audit what is stored."""

    audit: int | None = Field(
        None, ge=2, description="Solve so many samples at doubled steps too, and test noise, values and labels."
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Audit: largest error of the output, relative to its spread (upper end of the interval).",
    )
    richardson: bool = Field(False, description="Audit: the error against the exact solution, by the solver's order.")
    seed: int = Field(0, ge=0, description="Audit: seed of which samples are picked.")
    images: Source | None = Field(
        None, description=f"Audit: real images whose range and spread outputs are held against: {KINDS}."
    )

    @model_validator(mode="after")
    def _only_an_audit_solves(self) -> Self:
        given = [name for name in ("teacher", "tolerance", "richardson", "images") if getattr(self, name)]
        if given and self.audit is None:
            raise ValueError(f"{given[0]} is for an audit: add --audit K, the number of samples to solve again")
        return self


class ReproduceConfig(ResolveConfig):
    """Solve one sample again from its recipe, and compare it with what is stored."""

    sample: int = Field(ge=0, description="Id of the sample.")
    split: Literal["train", "holdout"] = Field("train", description="Split that the id is of.")
    tolerance: float = Field(0.0, ge=0, description="Largest difference that is no failure; 0: the same bits.")


class ConvertConfig(Config):
    """Write a dataset's samples in another layout, and seal that as the next manifest: same recipe, same bits."""

    store: StoreArgument
    to: FormatName = Field(description="File format of the new shards.")
    samples_per_shard: int | None = Field(None, ge=1, description="Samples in a new shard. Default: as now.")
    compression: CompressionName = Field("none", description="Compression of parquet shards.")
    dataset: DatasetName = "main"
    as_dataset: Annotated[DatasetName | None, arg(name="as")] = Field(
        None, description="Seal under this name, and leave the dataset as it is."
    )
    threads: int = Field(4, ge=1, description="Shards that are written at a time.")
    as_json: PrintJson = False

    @model_validator(mode="after")
    def _format_has_compression(self) -> Self:
        check_compression(self.to, self.compression, change="convert to")
        return self


class InspectConfig(Config):
    """What is in a dataset: its recipe, counts, sizes, labels and statistics."""

    store: StoreArgument
    dataset: DatasetName = "main"
    manifest: int | None = Field(None, ge=1, description="Number of a manifest. Default: the latest.")
    as_json: PrintJson = False
    picture: LocalName | None = Field(None, description="PNG file for a picture of a few trajectories.")
    lineage: bool = Field(False, description="Print the models and data behind it instead, back to the first teacher.")
    student: LocalName | None = Field(
        None, description="Lineage: folder of a saved student to begin with, not the dataset."
    )

    @model_validator(mode="after")
    def _students_have_a_lineage(self) -> Self:
        if self.student and not self.lineage:
            raise ValueError(f"student {self.student} is where a lineage begins: add --lineage")
        return self
