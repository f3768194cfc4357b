"""Real images by URI, scaled to [-1, 1]: what a teacher is fitted on, what segments start from, and what samples are
compared with.

    sklearn:digits    scikit-learn's handwritten digits, 1797 of 1x8x8 with 10 classes
    npz:PATH          arrays `images` [n, C, H, W] (float in [-1, 1], or uint8), `labels` [n], and perhaps `split` [n]
                      of "train" and "reference"
    idx:FOLDER        MNIST's format, plain or .gz: train-images-idx3-ubyte is `train`, t10k-... is `reference`.
                      Fashion-MNIST, 1x28x28 with 10 classes: apt-get install dataset-fashion-mnist, which makes
                      idx:/usr/share/datasets/fashion-mnist
    emoji:FOLDER@32   Noto emoji of the npm package emoji-datasource-google, 3786 of 3x32x32 (or @64) with 10 classes:
                      npm install emoji-datasource-google@16.0.0, which makes emoji:node_modules/emoji-datasource-google

`train` is every even row and `reference` every odd one, unless the source says otherwise: no teacher and no classifier
ever sees the reference half.
"""

import gzip
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ImageSplit = Literal["train", "reference", "all"]

_Arrays = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]

KINDS = "sklearn:digits, npz:PATH, idx:FOLDER or emoji:FOLDER@32"
"""Of sources, for help and errors."""

_IDX_SPLITS = {"train": "train", "t10k": "reference"}
_EMOJI_SIDE = 64


def read_images(uri: str, split: ImageSplit = "all") -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(images float32 [n, C, H, W] in [-1, 1], labels int64 [n]) of one split, in the source's order.

    Raises ValueError or FileNotFoundError in one line where there are none.
    """
    scheme, _, rest = uri.partition(":")
    if scheme not in _SOURCES:
        raise ValueError(f"image source {uri!r} is unknown; use {KINDS}")
    images, labels, splits = _SOURCES[scheme](rest)
    rows = np.ones(len(images), dtype=bool) if split == "all" else splits == split
    if not rows.any():
        raise ValueError(f"image source {uri!r} has no {split} images; its splits are {', '.join(np.unique(splits))}")
    return images[rows], labels[rows]


def images_digest(images: NDArray[np.float32], labels: NDArray[np.int64]) -> str:
    """sha256 of the pixels and labels."""
    digest = hashlib.sha256(str(images.shape).encode())
    for array in (images, labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


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
        images = _scaled(images)
    if not np.isfinite(images).all() or np.abs(images).max() > 1:
        raise ValueError(f"npz:{path} holds images outside [-1, 1]; scale them, or save them as uint8")
    return images.astype(np.float32), labels.astype(np.int64), splits


def _read_npz(path: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"npz:{path} is no readable .npz; name one that numpy.savez wrote") from error


def _idx(folder: str) -> _Arrays:
    parts = [_idx_part(Path(folder), name) for name in _IDX_SPLITS]
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        shapes = " and ".join(str(list(images.shape[1:])) for images, _ in parts)
        raise ValueError(f"idx:{folder} holds images {shapes}; name the folder of one set")
    splits = [np.full(len(labels), split) for (_, labels), split in zip(parts, _IDX_SPLITS.values(), strict=True)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _scaled(images[:, None]), labels.astype(np.int64), np.concatenate(splits)


def _idx_part(folder: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(images [n, H, W], labels [n]) of one half."""
    images, labels = (_read_idx(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        told = f"idx:{folder} holds {name} images {images.shape} with labels {labels.shape}"
        raise ValueError(f"{told}; name the folder of images [n, H, W] with a label each")
    return images, labels


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An array of bytes: two zeros, 8, the number of dimensions, each as a big-endian uint32, then the values."""
    found = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"idx:{folder} has no {name} or {name}.gz; name the folder of an MNIST-like set")
    try:
        data = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        data = b""
    start = 4 + 4 * data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data[4:start], ">u4") if len(data) >= start > 4 else np.zeros(0)
    if data[:3] != b"\0\0\x08" or len(data) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{found} is no whole IDX file of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape.astype(np.int64))


def _emoji(rest: str) -> _Arrays:
    match = re.fullmatch(r"(.*?)(?:@(\d+))?", rest)
    folder, side = (Path(match[1]), int(match[2] or 32)) if match else (Path(rest), 32)
    if side not in (32, _EMOJI_SIDE):
        raise ValueError(f"emoji:{rest} asks for {side} pixels; use @32 or @{_EMOJI_SIDE}")
    if not (folder / "emoji.json").is_file():
        told = f"emoji:{folder} has no emoji.json"
        raise FileNotFoundError(f"{told}; npm install emoji-datasource-google@16.0.0 and name its folder")
    named = sorted(_emoji_names(folder))
    images = np.stack([_on_white(folder / "img/google/64" / name) for name, _ in named])
    _, labels = np.unique([category for _, category in named], return_inverse=True)
    # By a hash: skin tones come in sixes, so that of two tones every other row would hold but one.
    splits = np.array([_coin(name) for name, _ in named])
    return (_boxed(images, side) / 127.5 - 1).astype(np.float32), labels.astype(np.int64), splits


def _emoji_names(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, category) of every emoji and skin tone that has a picture."""
    try:
        for entry in json.loads((folder / "emoji.json").read_text()):
            for each in (entry, *entry.get("skin_variations", {}).values()):
                if each["has_img_google"]:
                    yield each["image"], entry["category"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{folder}/emoji.json is not as emoji-datasource-google 16.0.0 has it ({error!r})"
        raise ValueError(f"{told}; name the folder of that package") from error


def _on_white(path: Path) -> NDArray[np.float64]:
    """The picture over a white ground, [3, 64, 64] in [0, 255]."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ValueError("emoji: needs Pillow; pip install 'limbeck[trainer]'") from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
    except OSError as error:
        told = f"{path} is no readable picture ({type(error).__name__})"
        raise ValueError(f"{told}; npm install emoji-datasource-google@16.0.0 again") from error
    if pixels.shape[:2] != (_EMOJI_SIDE, _EMOJI_SIDE):
        told = f"{path} is of {pixels.shape[0]}x{pixels.shape[1]} pixels"
        raise ValueError(f"{told}; name the folder of emoji-datasource-google 16.0.0, whose are 64x64")
    share = pixels[..., 3:] / 255
    return (share * pixels[..., :3] + (1 - share) * 255).transpose(2, 0, 1)


def _boxed(images: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Means over boxes: [n, 3, H, W] -> [n, 3, side, side]."""
    count, channels, height, _ = images.shape
    box = height // side
    return images.reshape(count, channels, side, box, side, box).mean(axis=(3, 5))


def _scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[0, 255] -> [-1, 1], of a whole set without a copy in float64."""
    return (np.arange(256) / 127.5 - 1).astype(np.float32)[images]


def _coin(name: str) -> str:
    return "train" if hashlib.sha256(name.encode()).digest()[0] % 2 == 0 else "reference"


def _parity(count: int) -> NDArray[np.str_]:
    return np.where(np.arange(count) % 2 == 0, "train", "reference")


_SOURCES: dict[str, Callable[[str], _Arrays]] = {"sklearn": _sklearn, "npz": _npz, "idx": _idx, "emoji": _emoji}
