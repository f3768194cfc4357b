"""Options of `limbeck fit`."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Config, Unprefixed, grouped, ungrouped
from limbeck.storage_schemas.images import KINDS
from limbeck.storage_schemas.places import LocalPath, Source
from limbeck.trainer.networks.options import CriticConfig, NetworkConfig, StudentConfig, TeacherConfig
from limbeck.trainer.objectives.options import ObjectiveConfig
from limbeck.trainer.objectives.table import WITH_CRITIC
from limbeck.trainer.options import ComputeConfig, OptimizationConfig, SavingConfig
from limbeck.trainer.reading.options import BatchConfig, StoreConfig


class FitConfig(Config):
    """Fit a student on stored trajectories, or a teacher on images."""

    out: LocalPath = Field(description="Folder of this run: checkpoints, metrics, model.")
    images: Source | None = Field(None, description=f"Real images for denoising, or for dmd's discriminator: {KINDS}.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the order, the weights and every random choice.")
    store: Unprefixed[StoreConfig] = Field(StoreConfig(), description="The store of trajectories.")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What is fitted.")
    student: Unprefixed[StudentConfig] = Field(StudentConfig(), description="What the student starts from.")
    network: NetworkConfig = Field(NetworkConfig(), description="The student's network.")
    critic: CriticConfig = Field(CriticConfig(), description=f"For {WITH_CRITIC}: the critic.")
    teacher: TeacherConfig = Field(TeacherConfig(), description=f"For {WITH_CRITIC}: the teacher beside the student.")
    batch: Unprefixed[BatchConfig] = Field(BatchConfig(), description="The batches.")
    optimization: Unprefixed[OptimizationConfig] = Field(OptimizationConfig(), description="How weights are updated.")
    compute: Unprefixed[ComputeConfig] = Field(ComputeConfig(), description="What a step is computed on.")
    saving: Unprefixed[SavingConfig] = Field(SavingConfig(), description="What is reported and kept, and how often.")

    @property
    def keeps_best(self) -> bool:
        """Whether a least holdout error makes a model the best."""
        return self.saving.keep_best and not self.objective.kind.has_critic

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Fill in defaults that follow from the objective."""
        if not isinstance(given, Mapping):
            return given
        objective = ObjectiveConfig.model_validate(given.get("objective") or {})
        chosen = {key: value for key, value in ungrouped(cls, given).items() if value is not None}
        filled = {**objective.kind.fit_defaults, **chosen, "objective": objective.filled()}
        if filled.get("process", "ve") != "ve":
            # The distribution of log sigma is that of process ve; the others draw their times uniformly.
            unused = {"p_mean": None, "p_std": None}
            for option in unused:
                if getattr(objective, option) is not None:
                    means = f"objective.{option} means nothing to process {filled['process']}"
                    raise ValueError(f"{means}; it belongs to ve")
            filled["objective"] = filled["objective"].model_copy(update=unused)
        return grouped(cls, filled)

    @model_validator(mode="after")
    def _check(self) -> "FitConfig":
        self._check_input()
        self._check_init()
        if not self.objective.kind.has_critic:
            self._check_alone()
        if self.critic.kind == "lora":
            self._check_lora()
        options, steps = self.objective.options, self.optimization.steps
        if options.student_every > steps:
            late = f"objective.critic_steps {options.student_every} leaves the student no update"
            raise ValueError(f"{late} in {steps} steps; give more --steps")
        if options.has_discriminator and self.compute.parallel == "fsdp":
            raise ValueError("objective.gan: its discriminator can't be sharded; use --parallel ddp")
        return self

    def _check_input(self) -> None:
        """Check that the objective is given what it reads, and no more."""
        name, real, process = self.objective.name, self.objective.kind.reads_images, self.student.process
        given = {"images": self.images, "data": self.store.data}
        wanted, other = ("images", "data") if real else ("data", "images")
        if given[wanted] is None:
            raise ValueError(f"objective {name} needs --{wanted}")
        if given[other] is not None and not self.objective.options.has_discriminator:
            raise ValueError(f"objective {name} reads --{wanted}; leave --{other} out")
        if real:
            self._check_no_store()
        elif process is not None:
            raise ValueError(f"process {process}: a student has its teacher's process; leave --process out")

    def _check_no_store(self) -> None:
        """Check a fit that reads images alone."""
        name = self.objective.name
        if self.student.init == "teacher":
            raise ValueError(f"init teacher: {name} makes a teacher; use scratch or the folder of a saved model")
        if self.student.told_guidance:
            raise ValueError(f"told_guidance: {name} has no guided targets; leave it out")
        for option, value in self.store:
            if option not in ("data", "dataset") and value != StoreConfig.model_fields[option].default:
                raise ValueError(f"{option} {value}: {name} reads images, no store; leave it out")

    def _check_init(self) -> None:
        """Check that a student that starts from another network is given nothing of what that has."""
        network, student, init = self.network, self.student, self.student.init
        described = {f"network.{name}": getattr(network, name) for name in ("name", "width", "depth")}
        described |= {"prediction": student.prediction, "sigma_data": student.sigma_data}
        for name, value in described.items():
            if value is not None and init != "scratch":
                raise ValueError(f"{name} {value}: --init {init} has its own; leave it out or use --init scratch")

    def _check_alone(self) -> None:
        """Check a student without a critic: of a teacher it is given what --init teacher loads, at most."""
        uri = self.teacher.uri if self.student.init == "teacher" else None
        for name, option, least in (
            ("critic", self.critic, CriticConfig()),
            ("teacher", self.teacher, TeacherConfig(uri=uri)),
        ):
            if option != least:
                raise ValueError(f"{name}: {self.objective.name} has none; leave it out, or fit one of {WITH_CRITIC}")

    def _check_lora(self) -> None:
        if self.teacher.offload or self.teacher.dtype != "float32":
            problem = "critic.kind lora shares the teacher's weights"
            raise ValueError(f"{problem}; leave teacher.offload and teacher.dtype out")
        if self.compute.parallel == "fsdp":
            raise ValueError("critic.kind lora: weights that it shares can't be sharded; use copy, or --parallel ddp")
        if self.student.told_guidance:
            raise ValueError("critic.kind lora: the teacher's weights take no guidance; use copy")
