"""Options of `limbeck fit`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.images import KINDS
from limbeck.storage_schemas.places import LocalPath, Source, StorePlace
from limbeck.trainer.networks.options import CriticConfig, DtypeName, NetworkConfig, PredictionName, TeacherConfig
from limbeck.trainer.objectives.kind import Kind, Options
from limbeck.trainer.objectives.options import ObjectiveConfig
from limbeck.trainer.objectives.table import WITH_CRITIC
from limbeck.trainer.reading.order import default_batch

ProcessName = Literal["ve", "linear_vp", "cosine_vp", "rectified_flow"]

_WARMUP = 100
# Options of how a store is read.
_OF_A_STORE = ("manifest", "follow_latest", "verify", "on_corrupt", "cache_folder", "cache_gib", "in_flight_mib")


class FitConfig(Config):
    """Fit a student on stored trajectories, or a teacher on images."""

    out: LocalPath = Field(description="Folder of this run: checkpoints, metrics, model.")
    data: StorePlace | None = Field(None, description="Store to read trajectories from: a folder or s3://... URI.")
    dataset: str = Field("main", description="Name of the dataset in the store.")
    manifest: int | None = Field(None, ge=1, description="Number of the manifest; default: the latest one.")
    images: Source | None = Field(None, description=f"Real images for denoising, or for dmd's discriminator: {KINDS}.")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What is fitted.")
    init: Source | None = Field(None, description="teacher, scratch or the folder of a saved model to start from.")
    network: NetworkConfig = Field(NetworkConfig(), description="The student's network.")
    critic: CriticConfig = Field(CriticConfig(), description=f"{WITH_CRITIC}: the critic.")
    teacher: TeacherConfig = Field(TeacherConfig(), description=f"{WITH_CRITIC}: the teacher beside the student.")
    told_guidance: bool = Field(
        False, description="Give the student each sample's guidance scale, of which the data has several."
    )
    process: ProcessName | None = Field(None, description="denoising: the forward process; default: ve.")
    prediction: PredictionName | None = Field(
        None, description="From scratch: what the network predicts; default: by the process (ve: edm)."
    )
    sigma_data: float | None = Field(
        None, gt=0, description="From scratch, for edm: rms of the data; default: measured."
    )

    steps: int = Field(3000, ge=1, description="Optimizer steps; of each stage, where there are several.")
    batch_size: int | None = Field(
        None, ge=1, description="Samples a step; default: 256, or whole micro-batches and lanes up to it."
    )
    micro_batch: int | None = Field(None, ge=1, description="Samples at a time on the device; divides the batch size.")
    lr: float | None = Field(
        None, gt=0, description=f"Peak learning rate of AdamW; default: 1e-4 for {WITH_CRITIC}, else 1e-3."
    )
    beta1: float | None = Field(
        None, ge=0, lt=1, description=f"AdamW's first beta; default: 0 for {WITH_CRITIC}, else 0.9."
    )
    warmup: int | None = Field(
        None,
        ge=0,
        description="Steps from 0 to the peak learning rate, in each stage; default: a tenth of the steps, at most "
        "100, or as the run began.",
    )
    decay: Literal["cosine", "linear", "none"] | None = Field(
        None, description="How the learning rate falls to 0; default: linear for progressive, else cosine."
    )
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    ema: float | None = Field(
        None, ge=0, lt=1, description="Decay of the average of weights that is kept; 0.999, for progressive 0 (none)."
    )
    autocast: Literal["none", "bfloat16", "float16"] = Field("none", description="Lower precision for the network.")
    compile: bool = Field(False, description="torch.compile the network.")
    gradient_checkpointing: bool = Field(
        False, description="Keep no activations inside of blocks: compute them again for the gradient."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: torch's own choice.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the order, the weights and every random choice.")

    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    checkpoints: StorePlace | None = Field(
        None, description="Folder or s3://... URI for checkpoints, with copies of the run's record, metrics and models."
    )
    keep_last: int = Field(2, ge=1, description="Checkpoints kept.")
    keep_best: bool = Field(
        True,
        description="Of the checkpoints on a validated step keep that of the least holdout error too, and its model "
        f"in OUT/best. Not for {WITH_CRITIC}: that error does not judge their samples.",
    )
    resume: bool = Field(True, description="Go on from the run's last checkpoint; --no-resume starts it over.")
    log_every: int = Field(50, ge=1, description="Steps between lines of metrics.")
    validate_every: int = Field(500, ge=0, description="Steps between errors on the holdout split; 0 for none.")
    save_dtype: DtypeName = Field("float32", description="Dtype of the final weights on disk.")

    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="Under torchrun: ddp, which auto is, or fsdp, which shards weights and their averages too."
    )
    lanes: int | None = Field(
        None,
        ge=1,
        description="Runs of rows that a batch is made of; ranks divide them. Default: gcd(batch_size, 8).",
    )
    follow_latest: bool = Field(False, description="Go over to the dataset's newest manifest when an epoch starts.")
    verify: Literal["always", "first", "never"] = Field(
        "always", description="When stored bytes are checked: on every read, on the first of this process, or not."
    )
    on_corrupt: Literal["fail", "substitute"] = Field(
        "fail", description="What unreadable samples do: end the fit, or give way to others, counted."
    )
    cache_folder: LocalPath | None = Field(None, description="Disk cache of remote stores; default: ~/.cache/limbeck.")
    cache_gib: float = Field(32, gt=0, description="Most that the disk cache holds, GiB.")
    in_flight_mib: int = Field(256, ge=1, description="Stored bytes being fetched from a remote store at a time, MiB.")
    ahead_mib: int = Field(64, ge=1, description="Batches made ahead of the step, MiB.")

    @property
    def samples_a_step(self) -> int:
        """Samples of a global batch."""
        assert self.batch_size is not None  # filled
        return self.batch_size

    @property
    def num_warmup(self) -> int:
        """Steps up to the peak learning rate."""
        return min(_WARMUP, self.steps // 10) if self.warmup is None else self.warmup

    @property
    def kind(self) -> Kind[Any]:
        """The objective that is fitted, and what it wants of a fit."""
        return self.objective.kind

    @property
    def options(self) -> Options:
        """The objective's own options."""
        return self.objective.options

    @property
    def keeps_best(self) -> bool:
        """Whether a least holdout error makes a model the best."""
        return self.keep_best and not self.kind.has_critic

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Fill in defaults that follow from the objective."""
        if not isinstance(given, Mapping):
            return given
        objective = ObjectiveConfig.model_validate(given.get("objective") or {})
        chosen = {key: value for key, value in given.items() if value is not None}
        filled = {**objective.kind.fit_defaults, **chosen, "objective": objective.filled()}
        filled.setdefault("batch_size", default_batch(filled.get("micro_batch"), filled.get("lanes")))
        if filled.get("process", "ve") != "ve":
            # The distribution of log sigma is that of process ve; the others draw their times uniformly.
            for option in ("p_mean", "p_std"):
                if getattr(objective, option) is not None:
                    raise ValueError(
                        f"objective.{option} means nothing to process {filled['process']}; it belongs to ve"
                    )
            filled["objective"] = filled["objective"].model_copy(update={"p_mean": None, "p_std": None})
        return filled

    @model_validator(mode="after")
    def _check(self) -> "FitConfig":
        self._check_input()
        self._check_network()
        self._check_others()
        self._check_reading()
        if self.micro_batch is not None and self.samples_a_step % self.micro_batch:
            problem = f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}"
            raise ValueError(f"{problem}; choose a divisor")
        if self.num_warmup >= self.steps and self.decay != "none":
            raise ValueError(
                f"warmup {self.num_warmup} leaves none of {self.steps} steps to decay; give fewer, or --warmup 0"
            )
        return self

    def _check_input(self) -> None:
        real = self.kind.reads_images
        wanted, other = ("images", "data") if real else ("data", "images")
        if getattr(self, wanted) is None:
            raise ValueError(f"objective {self.objective.name} needs --{wanted}")
        if getattr(self, other) is not None and not self.options.has_discriminator:
            raise ValueError(f"objective {self.objective.name} reads --{wanted}; leave --{other} out")
        if real and self.init == "teacher":
            raise ValueError(
                f"init teacher: {self.objective.name} makes a teacher; use scratch or the folder of a saved model"
            )
        if not real and self.process is not None:
            raise ValueError(f"process {self.process}: a student has its teacher's process; leave --process out")

    def _check_others(self) -> None:
        """Check the options of the networks beside the student, and of data of several scales."""
        if not self.kind.has_critic:
            begins = self.init == "teacher" and self.teacher == TeacherConfig(uri=self.teacher.uri)
            for name in ("critic",) if begins else ("critic", "teacher"):
                if getattr(self, name) != FitConfig.model_fields[name].default:
                    raise ValueError(
                        f"{name}: {self.objective.name} has none; leave it out, or fit one of {WITH_CRITIC}"
                    )
        if self.options.student_every > self.steps:
            late = f"objective.critic_steps {self.options.student_every} leaves the student no update"
            raise ValueError(f"{late} in {self.steps} steps; give more --steps")
        if self.critic.kind == "lora":
            self._check_lora()
        if self.parallel == "fsdp" and self.options.has_discriminator:
            raise ValueError("objective.gan: its discriminator can't be sharded; use --parallel ddp")
        if self.told_guidance and self.kind.reads_images:
            raise ValueError(f"told_guidance: {self.objective.name} has no guided targets; leave it out")

    def _check_lora(self) -> None:
        if self.teacher.offload or self.teacher.dtype != "float32":
            raise ValueError(
                "critic.kind lora shares the teacher's weights; leave teacher.offload and teacher.dtype out"
            )
        if self.parallel == "fsdp":
            raise ValueError("critic.kind lora: weights that it shares can't be sharded; use copy, or --parallel ddp")
        if self.told_guidance:
            raise ValueError("critic.kind lora: the teacher's weights take no guidance; use copy")

    def _check_reading(self) -> None:
        if self.lanes is not None and self.samples_a_step % self.lanes:
            raise ValueError(f"lanes {self.lanes} does not divide batch_size {self.batch_size}; choose a divisor")
        if self.follow_latest and self.manifest is not None:
            raise ValueError(f"follow_latest does not stay with manifest {self.manifest}; leave one of the two out")
        if not self.kind.reads_images:
            return
        for name in _OF_A_STORE:
            if getattr(self, name) != FitConfig.model_fields[name].default:
                raise ValueError(
                    f"{name} {getattr(self, name)}: {self.objective.name} reads images, no store; leave it out"
                )

    def _check_network(self) -> None:
        given = {name for name in ("width", "depth", "dropout") if getattr(self.network, name)}
        if self.network.name == "affine" and given:
            raise ValueError(f"network.{given.pop()} means nothing to affine; it belongs to residual_mlp, unet")
        if self.init == "scratch":
            return
        for name, value in (
            ("network.name", self.network.name),
            ("network.width", self.network.width),
            ("network.depth", self.network.depth),
            ("prediction", self.prediction),
            ("sigma_data", self.sigma_data),
        ):
            if value is not None:
                raise ValueError(f"{name} {value}: --init {self.init} has its own; leave it out or use --init scratch")
