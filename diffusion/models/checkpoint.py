"""Native checkpoints: a folder with model.json and model.safetensors. A student's is a teacher's.

model.json holds the spec (spec.py), the sha256 of the weights' file, and for a student the time grids it was fitted
for, by their number of steps. A model that needs no weights (a closed form) has an empty weights file.

A folder may be anybody's. Its description is held against the header of its weights before a network is built for real:
what costs memory or time is at most what lies there in bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.overrides import TorchFunctionMode

from limbeck.diffusion.models.description import LONGEST, check_model, described
from limbeck.diffusion.models.header import LONGEST as LONGEST_HEADER
from limbeck.diffusion.models.header import check_holds, names_of, shapes_in
from limbeck.diffusion.models.spec import CLOSED_FORMS, model_from_spec

MODEL_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its spec, its weights as safetensors bytes, and what else is worth knowing of it.

    grids: float64 times of the n-step sampler that a student was fitted for, by n. about: figures, licence, lineage.
    source: where it lies, for messages.
    """

    model: dict[str, Any]
    weights: bytes
    grids: Mapping[int, Sequence[float]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="the model", compare=False)

    @property
    def weights_sha256(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()

    def document(self) -> dict[str, Any]:
        """The contents of model.json."""
        grids = {str(steps): list(times) for steps, times in self.grids.items()}
        return {"model": self.model, "weights_sha256": self.weights_sha256, "grids": grids, "about": self.about}

    def build(self, *, device: str | torch.device = "cpu") -> nn.Module:
        """The denoiser with these weights, in float32, in evaluation mode. ValueError where they are another's."""
        return filled(lambda: model_from_spec(self.model), self).to(device).eval()


def filled(make: Callable[[], nn.Module], saved: Checkpoint) -> nn.Module:
    """What `make` gives for a checkpoint's description, with its weights. ValueError where these are another's."""
    source = f"{saved.source}: {WEIGHTS_FILE}"
    shapes = shapes_in(saved.weights, source)
    if saved.model["kind"] not in CLOSED_FORMS:
        numbers = sum(math.prod(one.shape) for one in shapes.values())
        check_holds(saved.model, tensors=len(shapes), numbers=numbers, source=source)
    with _on_meta():
        names = names_of(make(), shapes, source)
    module = make()
    try:
        state = safetensors.torch.load(saved.weights) if saved.weights else {}
    except SafetensorError as error:
        raise ValueError(f"{source} is damaged ({error}): fetch the model again") from error
    module.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    return module


def check_size(model: dict[str, Any], *, tensors: int, numbers: int, source: str) -> None:
    """Refuse to build a network whose weights `source`, which has so many tensors and numbers, can't hold."""
    check_model(model)
    check_holds(model, tensors=tensors, numbers=numbers, source=source)
    with _on_meta():
        needed = sum(tensor.numel() for tensor in model_from_spec(model).state_dict().values())
    if needed > numbers:
        raise ValueError(f"{source} holds at most {numbers} numbers, its description says {needed}: restore it")


@contextmanager
def _on_meta() -> Iterator[None]:
    """Modules that are built in here have no memory, and draw nothing from torch's seed."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """No weight gets a first value: on meta that says nothing, and imports torch's whole compiler, a second of time."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def pack(module: nn.Module, *, dtype: torch.dtype = torch.float32) -> bytes:
    """A module's parameters and buffers as safetensors bytes, floating ones in `dtype`."""
    state = {name: _cast(value.detach().cpu(), dtype) for name, value in module.state_dict().items()}
    return safetensors.torch.save(state) if state else b""


def widened(saved: Checkpoint, *, second_time: bool = False, told_guidance: bool = False) -> Checkpoint:
    """The same model with extra inputs (target time, guidance scale); none is ever taken away.

    They start at weight 0, so that the answers stay the same bits; their inner weights are drawn from torch's
    seed. Raises ValueError for a model in closed form.
    """
    asked = {"second_time": second_time, "told_guidance": told_guidance}
    if saved.model["kind"] != "network":
        names = " and ".join(name for name, wanted in asked.items() if wanted)
        raise ValueError(f"a {saved.model['kind']} model can't take {names}; start from a network")
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
    description, weights = Path(folder, MODEL_FILE), Path(folder, WEIGHTS_FILE)
    if not description.is_file():
        raise FileNotFoundError(f"{folder} holds no {MODEL_FILE}: name the folder of a saved model")
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}: fetch the model again")
    with open(description, "rb") as file:
        text = file.read(LONGEST + 1)
    return unpack(text, _read_whole(weights), source=str(folder))


def _read_whole(weights: Path) -> bytes:
    """A safetensors file, read only where it has the bytes of which its beginning tells."""
    size = weights.stat().st_size
    with open(weights, "rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), LONGEST_HEADER))
        shapes_in(length + header, str(weights), size=size)
        try:
            file.seek(0)
            return file.read()
        except MemoryError:
            raise ValueError(f"{weights} has {size} bytes, for which there is no memory: use a smaller one") from None


def unpack(description: bytes, weights: bytes, *, source: str) -> Checkpoint:
    """A checkpoint from the bytes of its two files, whose hash must agree. ValueError where they are damaged."""
    document = described(description, f"{source}: {MODEL_FILE}")
    grids = {int(steps): tuple(map(float, times)) for steps, times in document["grids"].items()}
    found = Checkpoint(document["model"], weights, grids, document["about"], source=source)
    shapes_in(weights, f"{source}: {WEIGHTS_FILE}")
    if found.weights_sha256 != document["weights_sha256"]:
        said, has = document["weights_sha256"][:12], found.weights_sha256[:12]
        raise ValueError(
            f"{source}: {WEIGHTS_FILE} has sha256 {has}..., {MODEL_FILE} says {said}...: fetch the model again"
        )
    return found


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()
