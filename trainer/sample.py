"""`limbeck sample`: new samples of a student, as a picture and as tensors."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import tyro
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from limbeck.diffusion import noise
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.errors import UsageError, usage_errors
from limbeck.storage_schemas.extras import need
from limbeck.storage_schemas.places import LocalPath
from limbeck.trainer.evaluation.sampling import FewSteps, Way, few_steps, noises_of
from limbeck.trainer.networks.student import check_finite, find_student, takes_labels

if TYPE_CHECKING:
    from PIL.Image import Image

_PICTURE = "a picture"
_CELL = 64
_GAP = 2
_BATCH = 512


class SampleConfig(Config):
    """Draw samples of a student: a PNG grid of images, and the tensors if asked."""

    run: tyro.conf.Positional[LocalPath] = Field(description="Folder of a fit, or of a saved model.")
    nfe: int = Field(ge=1, description="Network calls a sample: a number of steps that the student was fitted for.")
    count: int = Field(64, ge=1, description="Number of samples.")
    out: LocalPath | None = Field(None, description="PNG file to write a grid of the images to.")
    tensors: LocalPath | None = Field(None, description="Safetensors file to write noise, output and condition to.")
    seed: int = Field(0, ge=0, lt=2**64, description="Seed of the noise, of which the holdout split's line is used.")
    label: int | None = Field(None, ge=0, description="Class of all samples; default: every class in turn.")
    guidance: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Guidance scale, for a student that takes one; default: the middle one of those it was fitted on.",
    )
    sampling: Way | None = Field(
        None,
        description="How several steps are made: jump, from each time of the grid to the next; or renoise, to data "
        "each time, then fresh noise, as consistency models do; default: what the student was fitted for.",
    )
    device: str = Field("auto", description="Device: auto, cpu, cuda, cuda:1, ...")

    @model_validator(mode="after")
    def _check(self) -> "SampleConfig":
        if self.out is None and self.tensors is None:
            raise ValueError("nothing to write; give --out FILE.png, --tensors FILE.safetensors or both")
        return self


def run_sample(config: SampleConfig) -> int:
    """The command: sample, write, say."""
    with usage_errors():
        saved = find_student(config.run, config.nfe)
        device = pick_device(config.device)
    labels = sample_labels(saved, config.count, config.label)
    guidance = sample_guidance(saved, config.guidance)
    if config.out is not None:
        need("PIL.Image", _PICTURE)
        _check_images(saved, config.run)
    sampler = few_steps(saved, config.nfe, way=config.sampling, device=device)
    tensors = draw(sampler, tuple(saved.model["sample_shape"]), config.seed, labels, config.count, guidance=guidance)
    check_finite(tensors["output"], name=str(config.run))
    for path in filter(None, (config.out, config.tensors)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if config.tensors is not None:
        safetensors.torch.save_file(tensors, config.tensors)
    if config.out is not None:
        in_turn = labels is not None and config.label is None
        columns = saved.model["num_classes"] if in_turn else math.isqrt(config.count - 1) + 1
        image_grid(tensors["output"], columns=columns).save(config.out, format="PNG")
    print(" ".join(str(path) for path in (config.out, config.tensors) if path is not None))
    return 0


def draw(
    sampler: FewSteps, shape: tuple[int, ...], seed: int, labels: Tensor | None, count: int, *, guidance: float
) -> dict[str, Tensor]:
    """Samples as stored: noise = sigma_T eps of the holdout ids 0 .. count-1, output = x_0, and condition, if any."""
    device = sampler.device
    eps = torch.from_numpy(noise.standard_normal(seed, "holdout", range(count), shape))
    x_T = (sampler.noise_scale * eps).float()
    scale = torch.tensor(guidance, dtype=torch.float64)
    outputs = []
    for rows in torch.arange(count).split(_BATCH):
        start, condition = x_T[rows].to(device), None if labels is None else labels[rows].to(device)
        noises = noises_of(seed, "holdout", rows.numpy(), like=start)
        outputs.append(sampler(start, condition, scale, noises).cpu())
    return {"noise": x_T, "output": torch.cat(outputs)} | ({} if labels is None else {"condition": labels})


def sample_guidance(saved: Checkpoint, asked: float | None) -> float:
    """The guidance scale that a student takes: the one asked for, or the middle one of those it was fitted on."""
    takes_scales = saved.model.get("network", {}).get("told_guidance", False)
    if asked is not None and not takes_scales:
        raise UsageError(
            f"guidance {asked} means nothing to this student, which has its teacher's baked in; fit one --told-guidance"
        )
    scales = saved.about.get("guidance_scales", [1.0])
    return scales[len(scales) // 2] if asked is None else asked


def sample_labels(saved: Checkpoint, count: int, label: int | None) -> Tensor | None:
    """0, 1, ..., 0, 1, ... or `label` throughout, int64 [count]; None for a student fitted without labels."""
    classes = saved.model["num_classes"] if takes_labels(saved) else None
    if label is not None and (classes is None or label >= classes):
        has = "none" if classes is None else f"0 to {classes - 1}"
        raise UsageError(f"label {label} is no class of this student, which has {has}; choose another or leave it out")
    if classes is None:
        return None
    return torch.arange(count) % classes if label is None else torch.full((count,), label)


def image_grid(images: Tensor, *, columns: int) -> "Image":
    """Images [n, C, H, W] in [-1, 1], C 1 or 3, row by row; small ones enlarged so that each pixel shows."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    scale = max(1, _CELL // max(pixels.shape[2:]))
    cells = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    rows = -(-len(cells) // columns)
    # White below and right of each cell, and white cells to fill the last row.
    cells = pad(cells, (0, _GAP, 0, _GAP), value=255)
    cells = pad(cells, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(cells)), value=255)
    sheet = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    sheet = pad(sheet, (_GAP, 0, _GAP, 0), value=255)
    return need("PIL.Image", _PICTURE).fromarray(
        sheet[0].numpy() if len(sheet) == 1 else sheet.permute(1, 2, 0).contiguous().numpy()
    )


def _check_images(saved: Checkpoint, run: Path) -> None:
    shape = saved.model["sample_shape"]
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(f"{run} makes samples {shape}, no images [1 or 3, H, W]; use --tensors FILE in place of --out")
