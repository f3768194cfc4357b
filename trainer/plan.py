"""What a fit will do, from its config: the student to start from, the stages, and where samples come from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoint import Checkpoint
from diffusion.flow_map import FlowMap
from storage_schemas.store import Store
from trainer.config import FitConfig
from trainer.images import load_images
from trainer.objectives import Objective
from trainer.objectives.denoising import Denoising
from trainer.stream import ArraySource, Source
from trainer.student import Shape, check_fits, saved_model, scratch


@dataclass(frozen=True)
class Stage:
    """A run of optimizer steps on one objective. times: the grid that its student then samples on, if any."""

    name: str
    objective: Objective
    times: tuple[float, ...] = ()

    @property
    def num_steps(self) -> int:
        """Jumps of the student's sampler."""
        return len(self.times) - 1


@dataclass(frozen=True)
class Plan:
    """A fit in full. reads: what data it is, in a few words and digests; store: where it lies, if in one.

    shape: what its students share with the samples. labels: whether its samples have any.
    """

    start: Callable[[], Checkpoint]
    stages: tuple[Stage, ...]
    source: Callable[[tuple[str, ...]], Source]
    reads: dict[str, Any]
    shape: Shape
    holdout_error: Callable[[FlowMap, Stage], float] | None = None
    warnings: tuple[str, ...] = ()
    store: Store | None = None
    labels: bool = True


def plan_images(config: FitConfig) -> Plan:
    """Denoising of real images: one stage, no grid."""
    images, labels = load_images(config.images or "", "train")
    shape = Shape(
        sample_shape=tuple(images.shape[1:]),
        num_classes=int(labels.max()) + 1,
        process=_PROCESSES[config.process or "ve"],
        rms=float(images.double().square().mean().sqrt()),
    )
    options = config.objective
    objective = Denoising(
        sample_shape=shape.sample_shape,
        label_dropout=options.label_dropout or 0.0,
        p_mean=options.p_mean if options.p_mean is not None else 0.0,
        p_std=options.p_std or 1.0,
    )
    digest = images_digest(images, labels)
    return Plan(
        start=lambda: _start(config, shape),
        stages=(Stage("denoising", objective),),
        source=lambda columns: ArraySource(images, labels, digest),
        reads={"images": config.images, "split": "train", "count": len(images), "content_digest": digest},
        shape=shape,
    )


def _start(config: FitConfig, shape: Shape) -> Checkpoint:
    """A fresh network, or a saved model that fits the images."""
    start = scratch(config, shape) if config.init == "scratch" else saved_model(config.init or "")
    check_fits(start, shape, name=str(config.init))
    return start


_PROCESSES: dict[str, dict[str, Any]] = {
    "ve": {"name": "ve", "sigma_max": 80.0},
    "linear_vp": {"name": "linear_vp", "beta_min": 0.1, "beta_max": 20.0},
    "cosine_vp": {"name": "cosine_vp", "s": 0.008},
    "rectified_flow": {"name": "rectified_flow"},
}


def images_digest(images: Tensor, labels: Tensor) -> str:
    """sha256 of the pixels and labels."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for tensor in (images, labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def pick_device(name: str) -> torch.device:
    """auto: a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}; use auto or cpu") from error
    return device
