"""Students: what one starts from, and where a run keeps those it made.

    RUN/model/             the final model
    RUN/stages/4-step/     the student of each stage, where there are several

Each is a native checkpoint whose `grids` name the time grids it was fitted for, by their number of steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.spec import model_from_spec, process_from_spec
from limbeck.diffusion.models.unet import unet_spec
from limbeck.diffusion.prediction import Epsilon
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.trainer.networks.options import NetworkConfig, StudentConfig

# Prediction by process: one step from pure noise needs one that says something of x_0 there.
_PREDICTIONS = {"ve": "edm", "linear_vp": "v_prediction", "cosine_vp": "v_prediction", "rectified_flow": "velocity"}
_UNET_TIME_SCALE = 250.0


@dataclass(frozen=True)
class Shape:
    """What every student must share with its data."""

    sample_shape: tuple[int, ...]
    num_classes: int | None
    process: dict[str, Any]
    rms: float


def scratch(shape: Shape, student: StudentConfig, network: NetworkConfig, *, seed: int) -> Checkpoint:
    """A fresh network for data of this shape; its weights follow from the seed."""
    name = student.prediction or _PREDICTIONS.get(shape.process["name"], "v_prediction")
    predicts: dict[str, Any] = {"name": name}
    if name == "edm":
        predicts["sigma_data"] = student.sigma_data or round(shape.rms, 4)
    elif student.sigma_data is not None:
        raise ValueError(f"sigma_data {student.sigma_data} means nothing to prediction {name}; it belongs to edm")
    spec = {
        "kind": "network",
        "sample_shape": list(shape.sample_shape),
        "num_classes": shape.num_classes,
        "process": shape.process,
        "prediction": predicts,
        "network": _network(network, shape, prediction=name),
    }
    torch.manual_seed(seed)
    return Checkpoint(spec, checkpoint.pack(model_from_spec(spec)))


def _network(options: NetworkConfig, shape: Shape, *, prediction: str) -> dict[str, Any]:
    if options.name == "affine":
        return {"name": "affine"}
    if options.name == "unet":
        # A table of betas counts its times to a thousand; t in [0, 1] and log(r)/4 are short for a UNet's sinusoids.
        counts = shape.process["name"] == "discrete_vp" and prediction != "edm"
        scale = 1.0 if counts else _UNET_TIME_SCALE
        return unet_spec(shape.sample_shape, width=options.width or 64, depth=options.depth or 2, time_scale=scale)
    return {"name": "residual_mlp", "width": options.width or 256, "depth": options.depth or 4}


def check_fits(saved: Checkpoint, shape: Shape, *, name: str, whose: str = "the data") -> None:
    """Refuse a model that is no network, or one of another shape or process than `whose`, as the error calls it."""
    if saved.model["kind"] != "network":
        raise ValueError(f"{name} is a {saved.model['kind']} model without weights to fit; use --init scratch")
    theirs = (tuple(saved.model["sample_shape"]), saved.model["num_classes"], process_from_spec(saved.model["process"]))
    ours = (shape.sample_shape, shape.num_classes, process_from_spec(shape.process))
    for what, there, here in zip(("sample shape", "number of classes", "process"), theirs, ours, strict=True):
        if there != here:
            raise ValueError(f"{name} has {what} {there}, {whose} has {here}; use --init scratch or another model")


def check_few_steps(saved: Checkpoint, first_time: float) -> None:
    """Refuse a network that can't jump from the first time of a grid.

    One that predicts eps says little or nothing of x_0 at pure noise (Salimans & Ho 2022, section 4), and one that
    takes log(sigma/alpha) is given infinity where alpha is 0.
    """
    denoiser = saved.build()
    assert isinstance(denoiser, Denoiser)
    if isinstance(denoiser.prediction, Epsilon):
        raise ValueError("a student of few steps can't predict epsilon; use --init scratch --prediction v_prediction")
    network_time = denoiser.prediction.network_time(denoiser.process, torch.tensor(first_time, dtype=torch.float64))
    if not torch.isfinite(network_time):
        raise ValueError(
            f"{denoiser.prediction} is given {network_time} at the first step; use --init scratch --prediction sample"
        )


def with_dropout(model: dict[str, Any], dropout: float) -> dict[str, Any]:
    """The spec of the same network, dropping units with this probability while it is fitted."""
    if model["network"]["name"] == "affine":
        return model
    return {**model, "network": {**model["network"], "dropout": dropout}}


def saved_model(folder: str | Path) -> Checkpoint:
    """The model in a folder, or the final one of a run."""
    return checkpoint.load(_models(folder)[0])


def find_student(run_or_folder: str | Path, steps: int) -> Checkpoint:
    """The student that samples in `steps` jumps: the model in a folder, or the right one of a run."""
    folders = _models(run_or_folder)
    for folder in folders:
        saved = checkpoint.load(folder)
        if steps in saved.grids:
            return saved
    served = ", ".join(map(str, student_steps(run_or_folder))) or "no number of them"
    raise ValueError(f"{run_or_folder} was not fitted for {steps} steps; it serves {served}")


def student_steps(run_or_folder: str | Path) -> tuple[int, ...]:
    """Numbers of steps that a run's students were fitted for, ascending."""
    return tuple(sorted({steps for folder in _models(run_or_folder) for steps in checkpoint.load(folder).grids}))


def check_finite(samples: torch.Tensor, *, name: str) -> None:
    """Refuse samples [n, ...] that are no numbers."""
    lost = int((~samples.isfinite().flatten(1).all(dim=1)).sum())
    if lost:
        raise ManifestMismatch(f"{name} gives {lost} of {len(samples)} samples that are not finite; fit it anew")


def takes_labels(saved: Checkpoint) -> bool:
    """Whether a student was fitted on labels; one of a teacher with classes may know its null label alone."""
    return saved.model["num_classes"] is not None and bool(saved.about.get("labels", True))


def _models(run_or_folder: str | Path) -> list[Path]:
    root = Path(run_or_folder)
    candidates = [root, root / "model", *sorted(root.glob("stages/*-step"))]
    found = [folder for folder in candidates if (folder / checkpoint.MODEL_FILE).is_file()]
    if not found:
        raise FileNotFoundError(f"{root} holds no student; name the --out folder of a finished fit, or a saved model")
    return found
