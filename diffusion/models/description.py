"""model.json as it may be trusted: no larger, no deeper and of no other types than ours."""

import json
import math
from typing import Any

LONGEST = 16 << 20
"""Bytes of a model.json; ours hold some KiB, those of a table of betas some hundred."""

_SPEC = {
    "network": ("process", "prediction", "network"),
    "gaussian": ("process",),
    "mixture": ("process",),
    "python": ("process",),
}
"""Fields of a kind that are objects of their own."""

_ABOUT: dict[str, type] = {
    "labels": bool, "guidance_scales": list, "columns": list, "steps": int, "batch_size": int, "seed": int,
    "objective": dict, "reads": dict, "init": dict, "figures": dict, "stage": str, "sampling": str, "from_noise": str,
}  # fmt: skip
"""What is read of `about`, and its types. Whatever else it holds is for people."""


def described(data: bytes, source: str) -> dict[str, Any]:
    """The contents of a model.json. Raises ValueError in one line for what is none of ours."""
    if len(data) > LONGEST:
        raise ValueError(f"{source} has more than {LONGEST} bytes: name the folder of a model saved here")
    try:
        document = json.loads(data, parse_constant=_finite, parse_float=_finite)
        _check(document)
    except (ValueError, RecursionError) as error:
        problem = f"{source} is not one of ours ({error})"
        raise ValueError(f"{problem}: name the folder of a model saved here") from None
    found: dict[str, Any] = document
    return found


def _check(document: Any) -> None:
    _must_be(document, dict, "it")
    _must_be(document.get("model"), dict, "model")
    check_model(document["model"])
    _check_known(document)


def _check_known(document: dict[str, Any]) -> None:
    """All but the spec, which is also what is known of the model that a student began as."""
    for name, kind in (("weights_sha256", str), ("grids", dict), ("about", dict)):
        _must_be(document.get(name), kind, name)
    for steps, times in document["grids"].items():
        _must_be(times, list, f"grid {steps:.9}")
        if not (steps.isascii() and steps.isdecimal() and len(steps) < 10 and all(map(_is_number, times))):
            raise ValueError(f"grid {steps:.9} is no list of times by a number of steps")
    about = document["about"]
    for name, kinds in _ABOUT.items():
        if name in about:
            _must_be(about[name], kinds, f"about.{name}")
    scales = about.get("guidance_scales", [1.0])
    if not scales or not all(map(_is_number, scales)):
        raise ValueError("about.guidance_scales is no list of numbers")
    if "init" in about:
        _must_be(about["init"].get("uri"), str, "about.init.uri")
        _check_known(about["init"])


def check_model(model: dict[str, Any]) -> None:
    """Refuse a spec whose outer fields are of other types than ours: a ValueError in one line."""
    _must_be(model.get("kind"), str, "model.kind")
    for name in _SPEC.get(model["kind"], ()):
        _must_be(model.get(name), dict, f"model.{name}")
    shape, classes = model.get("sample_shape"), model.get("num_classes")
    _must_be(shape, list, "model.sample_shape")
    if not shape or not all(type(size) is int and 0 < size < 1 << 32 for size in shape):
        raise ValueError("model.sample_shape is no list of sizes")
    if classes is not None and not (type(classes) is int and 0 < classes < 1 << 32):
        raise ValueError("model.num_classes is no number of classes")


def _must_be(value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {'missing' if value is None else f'of type {type(value).__name__}'}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no finite number")
    return value
