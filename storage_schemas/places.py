"""What an option that names a place may hold: one rule each for stores, for what is on this machine, and for sources.

Flags and YAML fields have these types, so `~` is the home folder in all of them, a scheme is written out with ://, and
what a command keeps on this machine is never given as a bucket.
"""

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from limbeck.storage_schemas.errors import without_credentials

STORAGES = "file|local|memory|s3a?|gc?s|az|abfss?|https?|hf"
_URI = re.compile(rf"((?i:{STORAGES})(?=:)|[A-Za-z][\w+.-]+(?=:/)):(/*)(.*)", re.DOTALL)
"""A storage's scheme, or any word before :/. So run:1 is a folder, and so is C:/x where it is one."""

_SOURCE_AWAY = re.compile(rf"(?:[a-z_]+:)*?(?i:{STORAGES}):/")
PathT = TypeVar("PathT", str, Path)


def expanded(text: str) -> str:
    """The text with `~` as the home folder, also behind kinds such as npz: and data:npz:."""
    kinds = re.match(r"(?:[a-z_]+:)*(?=~)", text)
    return text if kinds is None else kinds[0] + os.path.expanduser(text[kinds.end() :])


def store_place(text: str) -> str:
    """A store: a folder, or scheme://... as that is written."""
    match = _URI.match(text)
    if match is None or (match[1].islower() and match[2][:2] == "//"):
        return expanded(text)
    scheme, slashes, rest = match[1].lower(), match[2], match[3]
    meant = f"{slashes[:1]}{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"
    raise ValueError(f"{without_credentials(text)} is no store: write {without_credentials(meant)}")


def local_path(given: PathT) -> PathT:
    """A file or folder of this machine."""
    if match := _URI.match(str(given)):
        # A Path has lost one of the slashes.
        place = without_credentials(f"{match[1]}://{match[3]}")
        raise ValueError(
            f"{place} is not on this machine: give a local file or folder; fit keeps a run in a bucket by --checkpoints"
        )
    return type(given)(expanded(str(given)))


def source(text: str) -> str:
    """A teacher, images or a saved model: KIND:NAME, or a folder of this machine."""
    if _SOURCE_AWAY.match(text):
        place = without_credentials(text)
        raise ValueError(f"{place} is not on this machine: copy it to a local file or folder, and give that")
    return expanded(text)


StorePlace = Annotated[str, AfterValidator(store_place)]
LocalPath = Annotated[Path, AfterValidator(local_path)]
LocalName = Annotated[str, AfterValidator(local_path)]
Source = Annotated[str, AfterValidator(source)]
