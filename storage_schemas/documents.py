"""The base of every JSON document in the store: frozen, no unknown fields, one line when it can't be read."""

import json
from collections.abc import Mapping
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck.storage_schemas.errors import StoreError, shown

SCHEMA_VERSION: Final = 2
MOST_BYTES = 64 << 20
"""Bytes of a document, at most: more is never read."""

_MOST_SHOWN = 200


class Document(BaseModel):
    """A frozen record that is written once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced. What was derived from the fields before, such as an id, is left behind."""
        copy = super().model_copy(update=update, deep=deep)
        for derived in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[derived]
        return copy

    def plain(self) -> dict[str, Any]:
        """The document as plain JSON values."""
        return self.model_dump(mode="python")

    def to_bytes(self) -> bytes:
        """What is written: JSON with sorted keys. 80.0 stays a float here; only the digest takes it for 80."""
        text = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @property
    def own_paths(self) -> tuple[str, ...]:
        """Where it may lie, by what it says; empty where it doesn't say that."""
        return ()

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """The document in `data`, which was read from `source`. It is refused where it says that it lies elsewhere."""
        if len(data) > MOST_BYTES:
            raise StoreError(
                f"{shown(source)} has more than {MOST_BYTES} bytes, which no {cls.__name__} has: restore it"
            )
        try:
            document = cls.model_validate_json(data, strict=True)
            own = document.own_paths
        except ValidationError as error:
            raise StoreError(_complaint(cls.__name__, shown(source), error)) from None
        except (ValueError, ArithmeticError, RecursionError, MemoryError) as error:
            raise StoreError(_refused(cls.__name__, shown(source), error)) from None
        if own and source.endswith(".json") and not f"/{source}".endswith(tuple(f"/{path}" for path in own)):
            raise StoreError(f"{shown(source)} is the document of {own[0]}: restore it")
        return document


def _complaint(kind: str, source: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["loc"] == ("schema_version",):
        version = f"schema version {_short(repr(first['input']))}, this program reads {SCHEMA_VERSION}"
        return f"{source} has {version}: use the release that wrote it"
    place = _short(".".join(map(str, first["loc"])))
    return _refused(kind, source, f"{place + ': ' if place else ''}{first['msg']}")


def _refused(kind: str, source: str, reason: object) -> str:
    return f"{source} is not a valid {kind} ({_short(reason)}): restore it"


def _short(text: object) -> str:
    """So much of what may be millions of characters as a line has room for."""
    short = shown(str(text)[: _MOST_SHOWN + 1])
    return short if len(short) <= _MOST_SHOWN else f"{short[:_MOST_SHOWN]}..."
