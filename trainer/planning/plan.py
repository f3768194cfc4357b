"""A fit's plan, made from its config: the student to start from, the stages, and where samples come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.teachers import Teacher
from limbeck.storage_schemas.images import images_digest, num_classes, summary
from limbeck.storage_schemas.recipe import TeacherRecord
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.networks.student import Shape, check_fits, saved_model, scratch
from limbeck.trainer.objectives.kind import Given, Stage
from limbeck.trainer.objectives.table import make_stages
from limbeck.trainer.reading.images import load_images
from limbeck.trainer.stream import ArraySource, Source


@dataclass(frozen=True)
class Plan:
    """A fit in full. reads: what data it is, in a few words and digests; store: where it lies, if in one.

    shape: what its students share with the samples. labels: whether its samples have any. teacher: the model that
    made them, on a device; made_by: its record. guidance: the scales it was guided by. notes: what a user reads first.
    """

    start: Callable[[], Checkpoint]
    stages: tuple[Stage, ...]
    source: Callable[[tuple[str, ...]], Source]
    reads: dict[str, Any]
    shape: Shape
    holdout_error: Callable[[FlowMap, Stage], float] | None = None
    train_error: Callable[[FlowMap, Stage], float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    store: Store | None = None
    labels: bool = True
    guidance: tuple[float, ...] = (1.0,)
    teacher: Callable[[torch.device], Teacher] | None = None
    made_by: TeacherRecord | None = None

    def warnings_of(self, student: FlowMap) -> list[str]:
        """Warnings on these samples, and on this student on them."""
        if (len(self.guidance) > 1) == student.told_guidance:
            return list(self.warnings)
        if student.told_guidance:
            problem = f"the data holds guidance scale {self.guidance[0]:g} alone, and this student takes scales"
            return [*self.warnings, f"{problem}: it learns of no other"]
        scales = ", ".join(f"{scale:g}" for scale in self.guidance)
        problem = f"the data holds guidance scales {scales}, and this student doesn't take them"
        return [*self.warnings, f"{problem}: it learns their mixture; --told-guidance gives it them"]


def plan_images(config: FitConfig) -> Plan:
    """Denoising of real images: one stage, no grid."""
    images, labels = load_images(config.images or "", "train")
    shape = Shape(
        sample_shape=tuple(images.shape[1:]),
        num_classes=num_classes(labels.numpy()),
        process=_PROCESSES[config.student.process or "ve"],
        rms=float(images.double().square().mean().sqrt()),
    )
    digest = images_digest(images.numpy(), labels.numpy())
    return Plan(
        start=lambda: _start(config, shape),
        stages=make_stages(config.objective.kind, config.objective.options, Given(shape.sample_shape, config.seed)),
        source=lambda columns: ArraySource(images, labels, digest),
        reads={"images": config.images, "split": "train", "count": len(images), "content_digest": digest},
        shape=shape,
        labels=shape.num_classes is not None,
        notes=(summary(config.images or "", "train", images.numpy(), labels.numpy()),),
    )


def _start(config: FitConfig, shape: Shape) -> Checkpoint:
    """A fresh network, or a saved model that fits the images."""
    init = config.student.init or ""
    start = fresh(config, shape) if init == "scratch" else saved_model(init)
    check_fits(start, shape, name=init)
    return start


def fresh(config: FitConfig, shape: Shape) -> Checkpoint:
    """The fresh network that --init scratch starts from."""
    return scratch(shape, config.student, config.network, seed=config.seed)


_PROCESSES: dict[str, dict[str, Any]] = {
    "ve": {"name": "ve", "sigma_max": 80.0},
    "linear_vp": {"name": "linear_vp", "beta_min": 0.1, "beta_max": 20.0},
    "cosine_vp": {"name": "cosine_vp", "s": 0.008},
    "rectified_flow": {"name": "rectified_flow"},
}
