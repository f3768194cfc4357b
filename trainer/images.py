"""Real images by URI, scaled to [-1, 1]: what a teacher is fitted on, and what samples are compared with.

    sklearn:digits    scikit-learn's handwritten digits, 1797 of 1x8x8 with 10 classes
    npz:PATH          arrays `images` [n, C, H, W] (float in [-1, 1], or uint8), `labels` [n], and perhaps `split` [n]
                      of "train" and "reference"

`train` is every even row and `reference` every odd one, unless the file says otherwise: no teacher and no classifier
ever sees the reference half.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ImageSplit = Literal["train", "reference", "all"]

_Arrays = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]


def load_images(uri: str, split: ImageSplit = "all") -> tuple[Tensor, Tensor]:
    """(images float32 [n, C, H, W] in [-1, 1], labels int64 [n]) of one split, in the source's order.

    Raises ValueError or FileNotFoundError in one line where there are none.
    """
    scheme, _, rest = uri.partition(":")
    if scheme not in _SOURCES:
        raise ValueError(f"image source {uri!r} is unknown; use sklearn:digits or npz:PATH")
    images, labels, splits = _SOURCES[scheme](rest)
    rows = np.ones(len(images), dtype=bool) if split == "all" else splits == split
    if not rows.any():
        raise ValueError(f"image source {uri!r} has no {split} images; its splits are {', '.join(np.unique(splits))}")
    return torch.from_numpy(images[rows]), torch.from_numpy(labels[rows])


def _sklearn(name: str) -> _Arrays:
    if name != "digits":
        raise ValueError(f"image source 'sklearn:{name}' is unknown; use sklearn:digits")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError("sklearn:digits needs scikit-learn; pip install 'limbeck[trainer]'") from error
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)
    return images, digits.target.astype(np.int64), _parity(len(images))


def _npz(path: str) -> _Arrays:
    if not Path(path).is_file():
        raise FileNotFoundError(f"npz:{path} is no file; name one that numpy.savez wrote")
    arrays = _read_npz(path)
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise ValueError(f"npz:{path} has no array {missing[0]!r}; save images, labels and perhaps split")
    images, labels = arrays["images"], arrays["labels"]
    splits = arrays["split"].astype(str) if "split" in arrays else _parity(len(images))
    if images.ndim != 4 or labels.shape != splits.shape or labels.shape != images.shape[:1]:
        shapes = f"images {images.shape}, labels {labels.shape}, split {splits.shape}"
        raise ValueError(f"npz:{path} holds {shapes}; save images [n, C, H, W], labels [n] and split [n]")
    if images.dtype == np.uint8:
        images = images / 127.5 - 1
    if not np.isfinite(images).all() or np.abs(images).max() > 1:
        raise ValueError(f"npz:{path} holds images outside [-1, 1]; scale them, or save them as uint8")
    return images.astype(np.float32), labels.astype(np.int64), splits


def _read_npz(path: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"npz:{path} is no readable .npz; name one that numpy.savez wrote") from error


def _parity(count: int) -> NDArray[np.str_]:
    return np.where(np.arange(count) % 2 == 0, "train", "reference")


_SOURCES: dict[str, Callable[[str], _Arrays]] = {"sklearn": _sklearn, "npz": _npz}
