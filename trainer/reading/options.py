"""Options of what is read, and of the batches made of it."""

from typing import Literal

from pydantic import Field, model_validator

from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.places import LocalPath, StorePlace
from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.order import default_batch, default_lanes


class StoreConfig(Config):
    """The store of trajectories, and how it is read."""

    data: StorePlace | None = Field(None, description="Store to read trajectories from: a folder or s3://... URI.")
    dataset: str = Field("main", description="Name of the dataset in the store.")
    manifest: int | None = Field(None, ge=1, description="Number of the manifest; default: the latest one.")
    follow_latest: bool = Field(False, description="Go over to the dataset's newest manifest when an epoch starts.")
    verify: Literal["always", "first", "never"] = Field(
        "always", description="When stored bytes are checked: at every read, at this process's first read, or never."
    )
    on_corrupt: Literal["fail", "substitute"] = Field(
        "fail", description="What happens at samples that can't be read: the fit ends, or takes others and counts them."
    )
    cache_folder: LocalPath | None = Field(None, description="Disk cache of remote stores; default: ~/.cache/limbeck.")
    cache_gib: float = Field(32, gt=0, description="Largest size of the disk cache, GiB.")
    in_flight_mib: int = Field(256, ge=1, description="Most bytes being fetched from a remote store at a time, MiB.")

    @property
    def reading(self) -> Reading:
        return Reading(
            verify=self.verify,
            on_corrupt=self.on_corrupt,
            cache_folder=self.cache_folder,
            cache_bytes=int(self.cache_gib * 2**30),
            in_flight_bytes=self.in_flight_mib << 20,
        )

    @model_validator(mode="after")
    def _check(self) -> "StoreConfig":
        if self.follow_latest and self.manifest is not None:
            raise ValueError(f"follow_latest does not stay with manifest {self.manifest}; leave one of the two out")
        return self


class BatchConfig(Config):
    """The batches of a fit."""

    batch_size: int | None = Field(
        None, ge=1, description="Samples of a step; default: 256, or whole micro-batches and lanes up to it."
    )
    micro_batch: int | None = Field(
        None, ge=1, description="Samples on the device at a time, which divides the batch size; default: all."
    )
    lanes: int | None = Field(
        None, ge=1, description="Runs of rows that make a batch, divided by ranks; default: gcd(batch size, 8)."
    )
    ahead_mib: int = Field(64, ge=1, description="Batches made ahead of the step, MiB.")

    @property
    def size(self) -> int:
        """Samples of a global batch."""
        return self.batch_size or default_batch(self.micro_batch, self.lanes)

    @property
    def num_lanes(self) -> int:
        return self.lanes or default_lanes(self.size)

    @model_validator(mode="after")
    def _check(self) -> "BatchConfig":
        for name, value in (("lanes", self.lanes), ("micro_batch", self.micro_batch)):
            if value is not None and self.size % value:
                raise ValueError(f"{name} {value} does not divide batch_size {self.size}; choose a divisor")
        return self
