"""The header of a safetensors file: what it holds, by names and shapes, before anything is built or copied."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

LONGEST = 64 << 20
"""Bytes of a header; a network of ten thousand tensors has one of 1 MiB."""

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}

# How parallel and compiled modules name their parameters: DDP as module.network..., torch.compile with a part between.
_WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True)
class Held:
    """A tensor of the file."""

    shape: tuple[int, ...]
    is_floating: bool


def shapes_in(weights: bytes, source: str, *, size: int | None = None) -> dict[str, Held]:
    """Every tensor of a safetensors file by its name. ValueError for another file, or one of too few or many bytes.

    size: the file's, where only its beginning is given.
    """
    size = len(weights) if size is None else size
    if not size:
        return {}
    length = int.from_bytes(weights[:8], "little")
    try:
        if length > min(size - 8, LONGEST):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(weights[8 : 8 + length])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        held = {name: _held(entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"its header tells of {end} bytes, there are {size - 8 - length}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} is damaged or no safetensors ({error}): fetch the model again") from None
    return held


def _held(entry: Mapping[str, Any]) -> Held:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _BITS or not all(type(size) is int and size >= 0 for size in (*shape, start)):
        raise ValueError(f"a tensor of dtype {entry['dtype']!s:.9}")
    if stop - start != math.prod(shape) * _BITS[entry["dtype"]] // 8:
        raise ValueError(f"{stop - start} bytes of {shape!s:.40}")
    return Held(tuple(shape), "F" in entry["dtype"])


def check_holds(model: Mapping[str, Any], *, tensors: int, numbers: int, source: str) -> None:
    """Refuse a description that tells of more layers than there are tensors, or of more width than numbers."""
    for name, value in _sizes({key: value for key, value in model.items() if key not in ("process", "sample_shape")}):
        layers = "depth" in name or "layers" in name or name.startswith("the length")
        if value > (tensors if layers else max(numbers, 1)):
            what = f"{tensors} tensors" if layers else f"{numbers} numbers"
            problem = f"{source} holds {what}, its description says {name} {value}"[:300]
            raise ValueError(f"{problem}: restore it, or fetch the model again")


def _sizes(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number, and every list's length, with its field's name."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _sizes(inner, str(key)[:40])
    elif isinstance(value, list):
        yield f"the length of {name}", len(value)
        for inner in value:
            yield from _sizes(inner, name)


def names_of(module: nn.Module, held: Mapping[str, Held], source: str) -> dict[str, str]:
    """The module's name of each tensor of the file, which has all of the right shape and kind, else ValueError.

    The prefixes of DDP and of torch.compile are left out where the rest is the module's. module: may be on meta.
    """
    wanted = {name: Held(tuple(value.shape), value.is_floating_point()) for name, value in module.state_dict().items()}
    names = {name: name for name in held}
    if held.keys() != wanted.keys():
        plain = {name: _without_wrappers(name) for name in held}
        names = plain if set(plain.values()) == wanted.keys() and len(plain) == len(wanted) else names
    found = set(names.values())
    if missing := sorted(wanted.keys() - found):
        raise ValueError(f"{source} has no {missing[0]}{_describe_prefix(held, wanted)}: fetch the model again")
    if more := sorted(found - wanted.keys()):
        raise ValueError(f"{source} has a {more[0]:.60} that is no part of its description: fetch the model again")
    for name, there in held.items():
        if there != wanted[names[name]]:
            has, says = list(there.shape), list(wanted[names[name]].shape)
            raise ValueError(f"{source} has {name} as {has}, its description says {says}: fetch the model again")
    return names


def _without_wrappers(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _describe_prefix(held: Mapping[str, Held], wanted: Mapping[str, Held]) -> str:
    first = {name.partition(".")[0] for name in held}
    if len(first) == 1 and not first & {name.partition(".")[0] for name in wanted}:
        return f" (its names begin with {first.pop():.40}.)"
    wrapper = next((one for one in _WRAPPERS if any(one in name.split(".") for name in held)), None)
    return f" (some of its names hold {wrapper}.)" if wrapper else ""
