"""How samples are laid out in files. Not what they are: another layout of a recipe holds the same samples."""

import re
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from limbeck.storage_schemas import parquet, paths, webdataset
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.errors import CorruptShard, UsageError
from limbeck.storage_schemas.file_format import FileFormat
from limbeck.storage_schemas.names import Samples
from limbeck.storage_schemas.recipe import Recipe

FORMATS: dict[str, FileFormat] = {"parquet": parquet, "webdataset": webdataset}
"""Every file format by name: a new one is its module and its row here. A name has letters and digits only."""

SHARD = re.compile(f"({paths.ATTEMPT_OF_TASK})(?:{'|'.join(re.escape(it.SUFFIX) for it in FORMATS.values())})")
"""File names of shards."""

if TYPE_CHECKING:
    FormatName = str
    CompressionName = str
else:
    FormatName = Literal[tuple(FORMATS)]
    CompressionName = Literal[tuple(dict.fromkeys(name for it in FORMATS.values() for name in it.COMPRESSIONS))]


class Layout(Document):
    """File format, samples per shard and compression, with an id that a person can read: parquet-2048."""

    format: FormatName = "parquet"
    samples_per_shard: Samples = 2048
    compression: CompressionName = "none"

    @model_validator(mode="after")
    def _format_has_compression(self) -> Self:
        check_compression(self.format, self.compression)
        return self

    @property
    def id(self) -> str:
        """parquet-2048, parquet-zstd-2048, webdataset-512."""
        words = [self.format, *([] if self.compression == "none" else [self.compression]), str(self.samples_per_shard)]
        return "-".join(words)

    @property
    def suffix(self) -> str:
        """File name ending of a shard."""
        return FORMATS[self.format].SUFFIX


def check_compression(format: FormatName, compression: CompressionName, *, change: str = "use format") -> None:
    """ValueError where a format doesn't have a compression. change: words for choosing another format."""
    if compression not in FORMATS[format].COMPRESSIONS:
        others = " or ".join(name for name, it in FORMATS.items() if compression in it.COMPRESSIONS)
        lacks = "compressed" if FORMATS[format].COMPRESSIONS == ("none",) else f"compressed by {compression}"
        raise ValueError(f"{format} shards are not {lacks}: drop compression, or {change} {others}")


def format_of(commit: Commit) -> FileFormat:
    """The format of a committed shard, by its layout's id."""
    name = commit.layout_id.partition("-")[0]
    if name not in FORMATS:
        raise CorruptShard(f"{commit.path} is in format {name!r}, which this release doesn't read: use a newer one")
    return FORMATS[name]


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Refuses a layout whose shards would cut a micro-batch: then a sample's last bits would hang on the layout."""
    if layout.samples_per_shard % recipe.micro_batch:
        raise UsageError(
            f"{layout.samples_per_shard} samples per shard is not a multiple of the micro-batch {recipe.micro_batch}: "
            "choose a micro-batch that divides it"
        )
