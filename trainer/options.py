"""Options of a fit: how weights are updated, what computes it, what is kept."""

from typing import Literal

from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.places import StorePlace
from limbeck.trainer.networks.options import DtypeName
from limbeck.trainer.objectives.table import WITH_CRITIC

_WARMUP = 100


class OptimizationConfig(Config):
    """How weights are updated. What depends on the objective is None until a FitConfig fills it in."""

    steps: int = Field(3000, ge=1, description="Optimizer steps; where there are several stages, of each one.")
    lr: float | None = Field(
        None, gt=0, description=f"Peak learning rate of AdamW; default: 1e-4 for {WITH_CRITIC}, else 1e-3."
    )
    beta1: float | None = Field(
        None, ge=0, lt=1, description=f"First beta of AdamW; default: 0 for {WITH_CRITIC}, else 0.9."
    )
    warmup: int | None = Field(
        None,
        ge=0,
        description="Steps in which the learning rate rises from 0 to its peak, in each stage; default: a tenth of the "
        "steps, at most 100; a run that goes on keeps the number that it began with.",
    )
    decay: Literal["cosine", "linear", "none"] | None = Field(
        None, description="How the learning rate falls to 0; default: linear for progressive, else cosine."
    )
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 for no clipping.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay of the saved average of weights; default: 0 (none) for progressive, else 0.999.",
    )

    @property
    def num_warmup(self) -> int:
        """Steps up to the peak learning rate."""
        return min(_WARMUP, self.steps // 10) if self.warmup is None else self.warmup

    @model_validator(mode="after")
    def _check(self) -> "OptimizationConfig":
        if self.num_warmup >= self.steps and self.decay != "none":
            raise ValueError(
                f"warmup {self.num_warmup} leaves none of {self.steps} steps to decay; give fewer, or --warmup 0"
            )
        return self


class ComputeConfig(Config):
    """What a step is computed on, and in which precision."""

    device: str = Field("auto", description="Device to fit on: auto, cpu, cuda, cuda:1, ...")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: torch's own choice.")
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="Under torchrun: ddp, which auto is, or fsdp, which shards weights and their averages too."
    )
    autocast: Literal["none", "bfloat16", "float16"] = Field("none", description="Lower precision to compute in.")
    compile: bool = Field(False, description="Compile the network with torch.compile.")
    gradient_checkpointing: bool = Field(
        False, description="Save memory: compute the activations inside of blocks again for the gradient."
    )


class SavingConfig(Config):
    """What a run reports and keeps, and how often."""

    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    checkpoints: StorePlace | None = Field(
        None,
        description="Folder or s3://... URI for checkpoints, with copies of the run's record, metrics and models; "
        "default: the run's own folder.",
    )
    keep_last: int = Field(2, ge=1, description="Number of newest checkpoints that are kept.")
    keep_best: bool = Field(
        True,
        description="Keep the checkpoint of the least holdout error too, of those on a validated step, and its model "
        f"in OUT/best. Not for {WITH_CRITIC}: that error does not judge their samples.",
    )
    resume: bool = Field(True, description="Go on from the run's last checkpoint; --no-resume starts it over.")
    log_every: int = Field(50, ge=1, description="Steps between lines of metrics.")
    validate_every: int = Field(500, ge=0, description="Steps between errors on the holdout split; 0 for none.")
    save_dtype: DtypeName = Field("float32", description="Dtype of the final weights on disk.")
