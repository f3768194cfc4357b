"""The base of every JSON document in the store: frozen, no unknown fields, one line when it can't be read."""

import json
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas.errors import StoreError

SCHEMA_VERSION: Final = 2


class Document(BaseModel):
    """A frozen record that is written once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """The document as plain JSON values."""
        return self.model_dump(mode="python")

    def to_bytes(self) -> bytes:
        """What is written: JSON with sorted keys. 80.0 stays a float here; only the digest takes it for 80."""
        text = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """The document in `data`, which was read from `source`."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise StoreError(_complaint(cls.__name__, source, error)) from None


def _complaint(kind: str, source: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["loc"] == ("schema_version",):
        version = f"schema version {first['input']!r}, this program reads {SCHEMA_VERSION}"
        return f"{source} has {version}: use the release that wrote it"
    place = ".".join(map(str, first["loc"]))
    return f"{source} is not a valid {kind} ({place + ': ' if place else ''}{first['msg']}): restore it"
