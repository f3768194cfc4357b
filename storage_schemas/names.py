"""What a name, a count and a time in a document may be: the types that the fields of all documents have.

Every name is a bare one, so that a path which is made of names stays where it belongs.
"""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

from limbeck.storage_schemas.errors import CONTROLS, shown
from limbeck.storage_schemas.paths import INDEX, is_outside

MOST = 2**63 - 1
"""The largest int64, as columns of ids hold them."""

MOST_SAMPLES_PER_SHARD = 2**26
"""The ids of a shard are in memory while it is read: 512 MiB of them."""

MOST_TEXT = 1 << 20
_TIME = re.compile(r"2[0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?\+00:00")
_BARE = re.compile(rf"(?!\.{{1,2}}$)(?:(?!{CONTROLS.pattern})[^/\\])+")
_LONGEST = 255


def _is_time(text: str) -> str:
    """Refuse a time not in our form and UTC: times are compared as text. Far years would overflow with a grace."""
    if not _TIME.fullmatch(text):
        raise ValueError(f"{shown(text)[:40]!r} is no time in UTC such as 2026-01-31T23:59:59+00:00")
    datetime.fromisoformat(text)
    return text


def _is_bare(text: str) -> str:
    if not _BARE.fullmatch(text):
        raise ValueError(f"{shown(text)[:40]!r} is no bare name: no slash and no control character is in one")
    return text


def _is_inside(text: str) -> str:
    if is_outside(text):
        raise ValueError(f"{shown(text)[:80]!r} is no path in a store")
    return text


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Attempt = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
LayoutId = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)?-[1-9][0-9]{0,7}$")]
"""<format>-<samples per shard>, with the compression between them where there is one."""

TaskName = Annotated[str, Field(pattern=rf"^(train|holdout)-{INDEX}$")]
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=_LONGEST)]
JobName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=_LONGEST)]
"""The name of a job, or of another writer of manifests."""

RunName = Annotated[str, AfterValidator(_is_bare), Field(max_length=2 * _LONGEST)]
"""The name of a reader: it begins with the name of the folder of its run."""

StoredPath = Annotated[str, AfterValidator(_is_inside), Field(max_length=1024)]
Time = Annotated[str, AfterValidator(_is_time)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES_PER_SHARD)]
"""Number of samples of one shard."""

Seconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(max_length=MOST_TEXT)]
"""A text for people; it is shown without control characters."""
