"""Native checkpoints: a folder with model.json and model.safetensors. A student's is a teacher's.

model.json holds the spec (spec.py), the sha256 of the weights' file, and for a student the time grids it was fitted
for, by their number of steps. A model that needs no weights (a closed form) has an empty weights file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from diffusion.spec import model_from_spec

MODEL_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its spec, its weights as safetensors bytes, and what else is worth knowing of it.

    grids: float64 times of the n-step sampler that a student was fitted for, by n. about: figures, licence, lineage.
    """

    model: dict[str, Any]
    weights: bytes
    grids: Mapping[int, Sequence[float]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def weights_sha256(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()

    def document(self) -> dict[str, Any]:
        """The contents of model.json."""
        grids = {str(steps): list(times) for steps, times in self.grids.items()}
        return {"model": self.model, "weights_sha256": self.weights_sha256, "grids": grids, "about": self.about}

    def build(self, *, device: str | torch.device = "cpu") -> nn.Module:
        """The denoiser with these weights, in float32, in evaluation mode."""
        module = model_from_spec(self.model)
        state = safetensors.torch.load(self.weights) if self.weights else {}
        module.load_state_dict(state)
        return module.to(device).eval()


def pack(module: nn.Module, *, dtype: torch.dtype = torch.float32) -> bytes:
    """A module's parameters and buffers as safetensors bytes, floating ones in `dtype`."""
    state = {name: _cast(value.detach().cpu(), dtype) for name, value in module.state_dict().items()}
    return safetensors.torch.save(state) if state else b""


def widened(saved: Checkpoint, *, second_time: bool = False, told_guidance: bool = False) -> Checkpoint:
    """The same model, told more: the time that it jumps to, its guidance scale. Nothing is ever taken away.

    What is new starts at weight 0, so that the answers stay the same bits; its inner weights are drawn from torch's
    seed. Raises ValueError for a model in closed form.
    """
    asked = {"second_time": second_time, "told_guidance": told_guidance}
    if saved.model["kind"] != "network":
        told = " and ".join(name for name, wanted in asked.items() if wanted)
        raise ValueError(f"a {saved.model['kind']} model has no {told} to be told of; start from a network")
    new = {name: True for name, wanted in asked.items() if wanted and not saved.model["network"].get(name)}
    if not new:
        return saved
    model = {**saved.model, "network": {**saved.model["network"], **new}}
    module = model_from_spec(model)
    module.load_state_dict({**module.state_dict(), **saved.build().state_dict()})
    return replace(saved, model=model, weights=pack(module))


def save(checkpoint: Checkpoint, folder: str | Path) -> None:
    """Write both files, the description last and each by rename: a folder with a model.json is a whole one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(checkpoint.document(), indent=1, sort_keys=True).encode()
    for name, data in ((WEIGHTS_FILE, checkpoint.weights), (MODEL_FILE, document)):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)


def load(folder: str | Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    folder = Path(folder)
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {MODEL_FILE}: name the folder of a saved model")
    return unpack(json.loads((folder / MODEL_FILE).read_text()), (folder / WEIGHTS_FILE).read_bytes())


def unpack(document: Mapping[str, Any], weights: bytes) -> Checkpoint:
    """A checkpoint from the contents of its two files, whose hash must agree."""
    try:
        grids = {int(steps): tuple(times) for steps, times in document["grids"].items()}
        checkpoint = Checkpoint(document["model"], weights, grids, document["about"])
        weights_sha256 = document["weights_sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{MODEL_FILE} is not one of ours ({error!r}): name the folder of a model saved here"
        ) from error
    if checkpoint.weights_sha256 != weights_sha256:
        told, found = weights_sha256[:12], checkpoint.weights_sha256[:12]
        raise ValueError(f"{WEIGHTS_FILE} has sha256 {found}..., {MODEL_FILE} says {told}...: fetch the model again")
    return checkpoint


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()
