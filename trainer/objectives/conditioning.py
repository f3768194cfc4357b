"""A student's conditioning beside its state and times: labels and guidance scales."""

from torch import Tensor

from limbeck.diffusion.denoiser import null_labelled
from limbeck.diffusion.flow_map import FlowMap
from limbeck.trainer.stream import Batch


def conditioning(student: FlowMap, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """(labels, guidance scales) of a batch as the student takes them: None for what it doesn't take."""
    guidance = batch.guidance if student.told_guidance else None
    return student_labels(student, batch.condition), guidance


def student_labels(student: FlowMap, stored: Tensor) -> Tensor | None:
    """Stored labels [B] as the student takes them."""
    return null_labelled(stored, student.denoiser.num_classes)
