"""Plain JSON <-> objects: what a recipe or a model.json says a model is.

    {"kind": "network", "sample_shape": [1, 8, 8], "num_classes": 10,
     "process": {"name": "ve", "sigma_max": 80.0}, "prediction": {"name": "edm", "sigma_data": 0.5},
     "network": {"name": "residual_mlp", "width": 256}}

or, in closed form, {"kind": "gaussian" | "mixture", "sample_shape": ..., "process": ..., and its parameters}.
Unknown names and fields are refused with a ValueError that lists what there is, and so is all that can't be meant.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.gaussian import GaussianTeacher, MixtureTeacher
from limbeck.diffusion.models.networks import NETWORKS
from limbeck.diffusion.prediction import PREDICTIONS, Prediction
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, Process, RectifiedFlow

Spec = Mapping[str, Any]
CLOSED_FORMS = ("gaussian", "mixture")
"""Kinds of models that have no weights."""

PROCESSES: dict[str, type[LinearVP | CosineVP | VE | RectifiedFlow | DiscreteVP]] = {
    "linear_vp": LinearVP,
    "cosine_vp": CosineVP,
    "ve": VE,
    "rectified_flow": RectifiedFlow,
    "discrete_vp": DiscreteVP,
}


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Whatever a description of other types or sizes than ours leads to is a ValueError in one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{what} can't be built as described ({type(error).__name__}: {reason})") from error


def process_from_spec(spec: Spec) -> Process:
    """{"name": "ve", "sigma_max": 80.0} -> VE(sigma_max=80.0)."""
    with usable("the process"):
        return _build("process", PROCESSES, spec)


def process_spec(process: Process) -> dict[str, Any]:
    """The inverse of process_from_spec."""
    return _spec_of(PROCESSES, process)


def prediction_from_spec(spec: Spec) -> Prediction:
    """{"name": "edm", "sigma_data": 0.5} -> EDM(sigma_data=0.5)."""
    with usable("the prediction"):
        return _build("prediction", PREDICTIONS, spec)


def model_from_spec(spec: Spec) -> nn.Module:
    """The denoiser (x_t, t, condition) -> x_0 that `spec` describes, with fresh weights where it has any."""
    builders = {"network": _network_denoiser, "gaussian": _gaussian, "mixture": _mixture}
    with usable("the model"):
        kind = spec.get("kind", "")
        if kind not in builders:
            raise ValueError(f"model kind {kind!r} is unknown; use one of {', '.join(builders)}")
        return builders[kind](spec)


def _network_denoiser(spec: Spec) -> Denoiser:
    num_classes = spec["num_classes"]
    network = _build_network(spec["network"], tuple(spec["sample_shape"]), num_classes)
    return Denoiser(network, process_from_spec(spec["process"]), prediction_from_spec(spec["prediction"]), num_classes)


def _build_network(spec: Spec, sample_shape: tuple[int, ...], num_classes: int | None) -> nn.Module:
    name = spec.get("name", "")
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown; use one of {', '.join(NETWORKS)}")
    options = {key: value for key, value in spec.items() if key != "name"}
    allowed = set(inspect.signature(NETWORKS[name]).parameters) - {"sample_shape", "num_classes"}
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f"network {name} has no field {unknown[0]!r}; its fields are: {', '.join(sorted(allowed))}")
    return NETWORKS[name](sample_shape=sample_shape, num_classes=num_classes, **options)


def _gaussian(spec: Spec) -> GaussianTeacher:
    return GaussianTeacher(process_from_spec(spec["process"]), mean=spec["mean"], variance=spec["variance"])


def _mixture(spec: Spec) -> MixtureTeacher:
    parameters = {name: tuple(spec[name]) for name in ("weights", "means", "variances")}
    return MixtureTeacher(process_from_spec(spec["process"]), **parameters)


def _build(what: str, table: Mapping[str, Any], spec: Spec) -> Any:
    name = spec.get("name", "")
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; use one of {', '.join(table)}")
    allowed = [field.name for field in dataclasses.fields(table[name])]
    unknown = sorted(set(spec) - {"name", *allowed})
    if unknown:
        raise ValueError(f"{what} {name} has no field {unknown[0]!r}; its fields are: {', '.join(allowed) or 'none'}")
    values = {key: tuple(spec[key]) if isinstance(spec[key], list) else spec[key] for key in allowed if key in spec}
    for key, value in values.items():
        if not all(type(number) in (int, float) for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{what} {name} has {key} {str(value)[:40]!r}: give numbers")
    return table[name](**values)


def _spec_of(table: Mapping[str, Any], thing: Any) -> dict[str, Any]:
    name = next(name for name, kind in table.items() if type(thing) is kind)
    return {"name": name, **dataclasses.asdict(thing)}
