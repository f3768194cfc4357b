"""Options of the networks of a fit."""

from typing import Literal

from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.places import Source

ProcessName = Literal["ve", "linear_vp", "cosine_vp", "rectified_flow"]
PredictionName = Literal["edm", "sample", "v_prediction", "velocity", "epsilon"]
DtypeName = Literal["float32", "float16", "bfloat16"]


class StudentConfig(Config):
    """What the student starts from. `init` is None until a FitConfig fills in the objective's default."""

    init: Source | None = Field(
        None,
        description="What the student starts from: teacher, scratch or the folder of a saved model; default: scratch "
        "for reflow and denoising, else teacher.",
    )
    told_guidance: bool = Field(False, description="Give the student each sample's guidance scale.")
    process: ProcessName | None = Field(None, description="For denoising: the forward process; default: ve.")
    prediction: PredictionName | None = Field(
        None, description="For scratch: what the network predicts; default: by the process (ve: edm)."
    )
    sigma_data: float | None = Field(None, gt=0, description="For scratch and edm: rms of the data; default: measured.")


class CriticConfig(Config):
    """The network that learns the score of the student's samples, for an objective that has one."""

    kind: Literal["copy", "lora"] = Field(
        "copy", description="What is learned: a copy of the teacher, or low-rank changes of its own weights (lora)."
    )
    rank: int = Field(16, ge=1, description="Rank of the changes of lora.")
    lr: float | None = Field(None, gt=0, description="Peak learning rate of the critic; default: the student's.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay of the average that the student learns from; 0 for none.")


class TeacherConfig(Config):
    """The teacher's network: what --init teacher starts from, and what is beside a student that has a critic."""

    uri: Source | None = Field(None, description="URI of the teacher, where neither store nor package has it.")
    dtype: DtypeName = Field("float32", description="Dtype of the teacher's weights.")
    offload: bool = Field(False, description="Keep the teacher's weights on the CPU between its calls.")


class NetworkConfig(Config):
    """The student's network. All but dropout belongs to --init scratch; other students keep their teacher's."""

    name: Literal["residual_mlp", "affine", "unet"] | None = Field(
        None,
        description="Kind of network: residual_mlp; unet, diffusers' UNet2DModel for images; or affine, one line for "
        "each coordinate and time, whose best fit is known; default: residual_mlp.",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Width of a residual_mlp, default: 256; or channels of a unet's first level, default: 64.",
    )
    depth: int | None = Field(
        None, ge=1, description="Blocks of a residual_mlp, default: 4; or of each level of a unet, default: 2."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout during the fit, whatever the student starts from.")

    @model_validator(mode="after")
    def _check(self) -> "NetworkConfig":
        for name in ("width", "depth", "dropout"):
            if self.name == "affine" and getattr(self, name):
                raise ValueError(f"network.{name} means nothing to affine; it belongs to residual_mlp, unet")
        return self
