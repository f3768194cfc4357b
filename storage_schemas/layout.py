"""How samples are laid out in files. Not what they are: another layout of a recipe holds the same samples."""

from typing import Literal, Self

from pydantic import model_validator

from limbeck.storage_schemas.documents import Document
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.names import Samples
from limbeck.storage_schemas.recipe import Recipe

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}


class Layout(Document):
    """File format, samples per shard and compression, with an id that a person can read: parquet-2048."""

    format: Literal["parquet", "webdataset"] = "parquet"
    samples_per_shard: Samples = 2048
    compression: Literal["none", "zstd"] = "none"

    @model_validator(mode="after")
    def _tar_is_plain(self) -> Self:
        if self.format == "webdataset" and self.compression != "none":
            raise ValueError("webdataset shards are not compressed: drop compression, or use format parquet")
        return self

    @property
    def id(self) -> str:
        """parquet-2048, parquet-zstd-2048, webdataset-512."""
        words = [self.format, *([] if self.compression == "none" else [self.compression]), str(self.samples_per_shard)]
        return "-".join(words)

    @property
    def suffix(self) -> str:
        """File name ending of a shard."""
        return SUFFIXES[self.format]


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Refuses a layout whose shards would cut a micro-batch: then a sample's last bits would hang on the layout."""
    if layout.samples_per_shard % recipe.micro_batch:
        raise UsageError(
            f"{layout.samples_per_shard} samples per shard is not a multiple of the micro-batch {recipe.micro_batch}: "
            "choose a micro-batch that divides it"
        )
