"""Teachers by URI.

builtin:digits            a small class-conditional EDM network, trained on scikit-learn's digits, in this package
builtin:gaussian          N(0.5, 0.25) in two dimensions, in closed form: its exact flow map is known
builtin:mixture           a product of two-component mixtures in two dimensions, likewise
python:MODULE:FACTORY     FACTORY() returns an nn.Module (x_t, t, condition) -> x_0 with the attributes
                          process, sample_shape and, where it has classes, num_classes
FOLDER                    a native checkpoint: a teacher trained here, or any student
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.diffusers_models import pipeline_checkpoint
from limbeck.diffusion.models.source import source_digest
from limbeck.diffusion.models.spec import process_from_spec, process_spec
from limbeck.diffusion.process import VE, Process
from limbeck.diffusion.solvers import no_exit

_BUILTIN = Path(__file__).parent / "builtin"

_CLOSED_FORMS: dict[str, dict[str, Any]] = {
    "gaussian": {"kind": "gaussian", "mean": 0.5, "variance": 0.25},
    "mixture": {"kind": "mixture", "weights": [0.5, 0.5], "means": [-0.75, 0.75], "variances": [0.04, 0.04]},
}


@dataclass(frozen=True)
class Teacher:
    """A denoiser (x_t, t, condition) -> x_0 in evaluation mode, and what a recipe must know of it.

    source_sha256 is the digest of a `python:` factory's code (source.py); elsewhere the spec and the weights say
    everything.
    grids: of a student, the times that it was fitted for, by their number of steps.
    scheduler_grid: of a pipeline, the options of make_grid for its scheduler's own times, if a grid of ours has them.
    """

    uri: str
    denoiser: nn.Module
    process: Process
    model: dict[str, Any]
    weights_sha256: str
    sample_shape: tuple[int, ...]
    num_classes: int | None
    source_sha256: str | None = None
    grids: Mapping[int, Sequence[float]] = field(default_factory=dict)
    scheduler_grid: Mapping[str, Any] | None = None


def load_teacher(uri: str, *, device: str | torch.device = "cpu", ignore: Collection[str] = ()) -> Teacher:
    """The teacher at `uri`. Raises ValueError or FileNotFoundError in one line where there is none.

    ignore: what a pipeline does to its samples and the teacher shall not (schedulers.IGNORABLE).
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "python":
        return _from_factory(uri, rest, device=device)
    return from_checkpoint(uri, load_checkpoint(uri, ignore=ignore), device=device)


def check_unasked(uri: str, *, flag: str) -> None:
    """Refuse a teacher that a recipe names and the user doesn't. A recipe may come from anybody.

    So code runs, a folder is opened and a network is asked only for a uri that the user gives too, by `flag`; what this
    package ships is used unasked. ValueError in one line.
    """
    scheme = uri.partition(":")[0]
    if scheme == "python":
        raise ValueError(f"the teacher {uri} is code and isn't in the store: allow it to run by {flag} {uri}")
    if scheme != "builtin":
        problem = f"the teacher {uri} isn't in the store, and what a recipe names is used only if you name it, too"
        raise ValueError(f"{problem}: give {flag} {uri}")


def load_checkpoint(uri: str, *, ignore: Collection[str] = ()) -> Checkpoint:
    """The model behind any URI but python:. Raises ValueError or FileNotFoundError in one line where there is none."""
    scheme, _, rest = uri.partition(":")
    if scheme == "builtin":
        return builtin_checkpoint(rest)
    if scheme == "diffusers":
        return pipeline_checkpoint(rest, ignore=ignore)
    if not Path(uri, checkpoint.MODEL_FILE).is_file():
        raise FileNotFoundError(f"{uri} is no folder with a {checkpoint.MODEL_FILE}: {_meant(uri)}")
    return checkpoint.load(uri)


def _meant(uri: str) -> str:
    """What a user may have meant by a name that is no native checkpoint."""
    if any(Path(uri, name).is_dir() for name in ("unet", "transformer")):
        return f"it is a pipeline of diffusers, write diffusers:{uri}"
    if uri in _shipped():
        return f"write builtin:{uri}"
    return "write builtin:NAME, diffusers:FOLDER for a pipeline, or python:MODULE:FACTORY for code of yours"


def from_checkpoint(uri: str, saved: Checkpoint, *, device: str | torch.device = "cpu") -> Teacher:
    """A native checkpoint as a teacher."""
    return Teacher(
        uri=uri,
        denoiser=saved.build(device=device).requires_grad_(False),
        process=process_from_spec(saved.model["process"]),
        model=saved.model,
        weights_sha256=saved.weights_sha256,
        sample_shape=tuple(saved.model["sample_shape"]),
        # A student that was fitted without labels knows its null label alone.
        num_classes=saved.model["num_classes"] if saved.about.get("labels", True) else None,
        grids=saved.grids,
        scheduler_grid=saved.about.get("grid"),
    )


def builtin_checkpoint(name: str) -> Checkpoint:
    """The checkpoint behind `builtin:NAME`. Raises ValueError for a name that is not shipped."""
    if name in _CLOSED_FORMS:
        spec = {"sample_shape": [2], "num_classes": None, "process": process_spec(VE()), **_CLOSED_FORMS[name]}
        return Checkpoint(spec, b"")
    if name not in _shipped():
        raise ValueError(f"builtin:{name} is not shipped; use one of builtin:{', builtin:'.join(_shipped())}")
    return checkpoint.load(_BUILTIN / name)


def _shipped() -> list[str]:
    """Names behind builtin:."""
    return [*sorted(path.parent.name for path in _BUILTIN.glob(f"*/{checkpoint.MODEL_FILE}")), *_CLOSED_FORMS]


def _from_factory(uri: str, path: str, *, device: str | torch.device) -> Teacher:
    module_name, _, factory_name = path.partition(":")
    with no_exit(uri):
        module = importlib.import_module(module_name)
        factory: Callable[[], nn.Module] | None = getattr(module, factory_name or "_", None)
        if factory is None:
            raise ValueError(f"{uri}: {module_name} has no {factory_name!r}; write python:MODULE:FACTORY")
        denoiser = factory().to(device).eval().requires_grad_(False)
    process, shape = (_attribute(uri, denoiser, name) for name in ("process", "sample_shape"))
    num_classes: int | None = getattr(denoiser, "num_classes", None)
    model: dict[str, Any] = {
        "kind": "python",
        "sample_shape": [int(size) for size in shape],
        "num_classes": num_classes,
        "process": process_spec(process),
    }
    return Teacher(
        uri=uri,
        denoiser=denoiser,
        process=process,
        # Through JSON once, so that tuples compare as the lists that a recipe gives back.
        model=json.loads(json.dumps(model)),
        weights_sha256=hashlib.sha256(checkpoint.pack(denoiser)).hexdigest(),
        sample_shape=tuple(model["sample_shape"]),
        num_classes=num_classes,
        source_sha256=source_digest(module),
    )


def _attribute(uri: str, denoiser: nn.Module, name: str) -> Any:
    if not hasattr(denoiser, name):
        raise ValueError(
            f"{uri}: its denoiser has no attribute {name!r}; set it to what limbeck.diffusion.process describes"
        )
    return getattr(denoiser, name)
