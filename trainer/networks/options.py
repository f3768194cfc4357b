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
    told_guidance: bool = Field(
        False, description="Give the student each sample's guidance scale, for data of several scales."
    )
    process: ProcessName | None = Field(None, description="For denoising: the forward process; default: ve.")
    prediction: PredictionName | None = Field(
        None, description="For --init scratch: what the network predicts; default: by the process (ve: edm)."
    )
    sigma_data: float | None = Field(
        None, gt=0, description="For --init scratch and edm: rms of the data; default: measured."
    )


class CriticConfig(Config):
    """The network that learns the score of the student's samples, for an objective that has one."""

    kind: Literal["copy", "lora"] = Field(
        "copy", description="A copy of the teacher, or low-rank changes of the teacher's own weights."
    )
    rank: int = Field(16, ge=1, description="lora: rank of the changes.")
    lr: float | None = Field(None, gt=0, description="Its peak learning rate; default: the student's.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay of the average of it that the student learns from; 0: none.")


class TeacherConfig(Config):
    """The teacher's network: what --init teacher starts from, and what is beside a student that has a critic."""

    uri: Source | None = Field(None, description="Its uri, where neither the store keeps it nor this package.")
    dtype: DtypeName = Field("float32", description="Its weights' dtype.")
    offload: bool = Field(False, description="Keep its weights on the CPU between its calls.")


class NetworkConfig(Config):
    """The student's network. All but dropout belongs to --init scratch; other students keep their teacher's."""

    name: Literal["residual_mlp", "affine", "unet"] | None = Field(
        None,
        description="residual_mlp; unet, diffusers' UNet2DModel for images; affine: one line a coordinate and time, "
        "whose best fit is known.",
    )
    width: int | None = Field(
        None, ge=1, description="Width of the residual MLP (default: 256), or channels of the UNet's first level (64)."
    )
    depth: int | None = Field(
        None, ge=1, description="Blocks of the residual MLP (default: 4), or of each level of the UNet (2)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout while fitting, whatever the student starts from.")

    @model_validator(mode="after")
    def _check(self) -> "NetworkConfig":
        for name in ("width", "depth", "dropout"):
            if self.name == "affine" and getattr(self, name):
                raise ValueError(f"network.{name} means nothing to affine; it belongs to residual_mlp, unet")
        return self
