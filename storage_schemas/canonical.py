"""One byte string for one meaning: what every digest in the store is taken of."""

import hashlib
import json
from typing import Any

EXACT_INTEGERS = 2**53
"""A whole float64 below this is written as an integer, so that 80 and 80.0 in a configuration are one recipe."""


def canonical_json(obj: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, shortest digits that read back to the same float64; inf and nan are refused."""
    text = json.dumps(_normal(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(obj: Any) -> str:
    """sha256 of `canonical_json(obj)`, 64 hex digits."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def _normal(obj: Any) -> Any:
    if isinstance(obj, float) and obj.is_integer() and abs(obj) < EXACT_INTEGERS:
        return int(obj)
    if isinstance(obj, dict):
        return {_key(key): _normal(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_normal(value) for value in obj]
    return obj


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"JSON keys are strings, this one is {key!r}")
    return key
