"""The real images of storage_schemas/images.py as tensors."""

import torch
from torch import Tensor

from limbeck.storage_schemas.images import ImageSplit, read_images

__all__ = ["ImageSplit", "load_images"]


def load_images(uri: str, split: ImageSplit = "all") -> tuple[Tensor, Tensor]:
    """(images float32 [n, C, H, W] in [-1, 1], labels int64 [n]) of one split, in the source's order.

    Raises ValueError or FileNotFoundError in one line where there are none.
    """
    images, labels = read_images(uri, split)
    return torch.from_numpy(images), torch.from_numpy(labels)
