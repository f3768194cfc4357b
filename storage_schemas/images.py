"""Real images by URI, scaled to [-1, 1]: what a teacher is fitted on, what segments start from, and what samples are
compared with.

    sklearn:digits    scikit-learn's handwritten digits, 1797 of 1x8x8 with 10 classes
    npz:PATH          arrays `images` [n, C, H, W] (float in [-1, 1], or uint8), `labels` [n], and perhaps `split` [n]
                      of "train" and "reference"
    folder:PATH@32    PNG, JPEG and WebP files, in class folders or in none: see storage_schemas/image_folder.py
    idx:FOLDER        MNIST's format, plain or .gz: train-images-idx3-ubyte is `train`, t10k-... is `reference`.
                      Fashion-MNIST, 1x28x28 with 10 classes: apt-get install dataset-fashion-mnist, which makes
                      idx:/usr/share/datasets/fashion-mnist
    emoji:FOLDER@32   Noto emoji of the npm package emoji-datasource-google, 3786 of 3x32x32 (or @64) with 10 classes:
                      npm install emoji-datasource-google@16.0.0, which makes emoji:node_modules/emoji-datasource-google

`train` is every even row and `reference` every odd one, unless the source says otherwise: no teacher and no classifier
ever sees the reference half. Labels are classes 0 to n - 1, each with images, or -1 throughout where there are none.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from limbeck.storage_schemas.extras import need
from limbeck.storage_schemas.image_folder import read_folder

ImageSplit = Literal["train", "reference", "all"]

_Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[np.str_]]
"""Images as a source has them, uint8 or float in [-1, 1], labels and splits."""

KINDS = "sklearn:digits, npz:PATH, idx:FOLDER, emoji:FOLDER@32 or folder:PATH@32"
"""The kinds of image sources, for help and errors."""

_CHANNELS = (1, 3, 4)
"""Channels of pictures: grey, RGB, RGBA."""

_IDX_SPLITS = {"train": "train", "t10k": "reference"}
_EMOJI_SIDE = 64


def read_images(uri: str, split: ImageSplit = "all") -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(images float32 [n, C, H, W] in [-1, 1], labels int64 [n]) of one split, in the source's order.

    Raises ValueError or FileNotFoundError in one line where there are none, or where they can't be meant.
    """
    scheme, _, rest = uri.partition(":")
    if scheme not in _SOURCES:
        meant = f"; did you mean folder:{uri}@32?" if Path(uri).is_dir() else ""
        raise ValueError(f"image source {uri!r} is unknown{meant or f'; use {KINDS}'}")
    images, labels, splits = _SOURCES[scheme](rest)
    _check_images(uri, images)
    _check_labels(uri, labels)
    rows = np.ones(len(images), dtype=bool) if split == "all" else splits == split
    if not rows.any():
        raise ValueError(f"image source {uri!r} has no {split} images; its splits are {', '.join(np.unique(splits))}")
    if split == "train" and len(lost := np.setdiff1d(labels, labels[rows])):
        found = f"{uri} has no train image of class {lost[0]:g}"
        raise ValueError(f"{found}; every class needs one, which the images of even places are unless `split` says so")
    chosen = images[rows]
    return _scaled(chosen) if chosen.dtype == np.uint8 else chosen.astype(np.float32), labels[rows].astype(np.int64)


def num_classes(labels: NDArray[np.int64]) -> int | None:
    """Classes of what `read_images` gave, None where it has no labels."""
    return int(labels.max()) + 1 if labels.max() >= 0 else None


def summary(uri: str, split: ImageSplit, images: NDArray[np.float32], labels: NDArray[np.int64]) -> str:
    """What was read, in a line for the user."""
    classes = num_classes(labels)
    shape = "x".join(map(str, images.shape[1:]))
    return f"{uri}: {len(images)} {split} images of {shape}, {f'{classes} classes' if classes else 'no labels'}"


def _check_images(uri: str, images: NDArray[Any]) -> None:
    """Refuse pixels that mean something else than [n, C, H, W] of [-1, 1], or of bytes."""
    if not images.size:
        raise ValueError(f"{uri} holds no images (their shape is {list(images.shape)}); name a source with some")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"{uri} has images of {images.dtype}; save them as uint8 in 0..255, or as floats in [-1, 1]")
    if _is_channels_last(images.shape):
        found = f"{uri} has images {list(images.shape)}, which looks like [n, H, W, C], channels last"
        raise ValueError(f"{found}; save images.transpose(0, 3, 1, 2), which is [n, C, H, W]")
    lowest, highest = images.min(), images.max()
    if not np.isfinite(lowest) or not np.isfinite(highest):
        odd = int((~np.isfinite(images).all(axis=(1, 2, 3))).sum())
        raise ValueError(f"{uri} has NaN or infinity in {odd} of {len(images)} images; leave those out")
    if images.dtype == np.uint8:
        if highest <= 1:
            found = f"{uri} has bytes from {lowest} to {highest}, and white is 255"
            raise ValueError(f"{found}; save images * 255, or floats in [-1, 1] if they are meant so")
    elif lowest < -1 or highest > 1:
        found = f"{uri} has images from {lowest:g} to {highest:g}, outside [-1, 1]"
        raise ValueError(f"{found}; scale them, or save them as uint8 in 0..255")
    elif lowest >= 0:
        found = f"{uri} has images from {lowest:g} to {highest:g}, none below 0, and black is -1"
        raise ValueError(f"{found}; save images * 2 - 1 if they are in [0, 1], or uint8 in 0..255 if they are meant so")


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether [n, a, b, c] can hardly be [n, C, H, W]: c is a number of channels, and a is none, or a side as b is."""
    _, a, b, c = shape
    return c in _CHANNELS and c < b and (a not in _CHANNELS or a == b)


def _check_labels(uri: str, labels: NDArray[Any]) -> None:
    """Refuse what is no class of a network: it would get an output for every number up to the largest."""
    if labels.dtype.kind in "biuf":
        found = np.unique(labels)
        if np.array_equal(found, np.arange(len(found))) or np.array_equal(found, [-1]):
            return
    else:
        found = np.unique(labels.astype(str))
    shown = [str(value) for value in found.tolist()]
    values = ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])
    problem = f"{uri} has labels {values}; classes are 0 to n - 1, with images of each"
    raise ValueError(f"{problem}: save numpy.unique(labels, return_inverse=True)[1]")


def images_digest(images: NDArray[np.float32], labels: NDArray[np.int64]) -> str:
    """sha256 of the pixels and labels."""
    digest = hashlib.sha256(str(images.shape).encode())
    for array in (images, labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _sklearn(name: str) -> _Arrays:
    if name != "digits":
        raise ValueError(f"image source 'sklearn:{name}' is unknown; use sklearn:digits")
    digits = need("sklearn.datasets", "sklearn:digits").load_digits()
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
        shapes = f"images {list(images.shape)}, labels {list(labels.shape)}, split {list(splits.shape)}"
        raise ValueError(f"npz:{path} holds {shapes}; save images [n, C, H, W], labels [n] and split [n]")
    if len(odd := np.setdiff1d(splits, ["train", "reference"])):
        raise ValueError(f"npz:{path} has a split {str(odd[0])!r}; save train or reference for each image")
    return images, labels, splits


def _read_npz(path: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in ("images", "labels", "split") if name in file}
    except Exception as error:  # of numpy, zipfile and zlib, by a dozen names
        pickled = "; it holds pickled objects, which are not loaded" if "allow_pickle" in str(error) else ""
        raise ValueError(f"npz:{path} is no readable .npz{pickled}; name one that numpy.savez wrote") from error


def _idx(folder: str) -> _Arrays:
    parts = [_idx_part(Path(folder), name) for name in _IDX_SPLITS]
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        shapes = " and ".join(str(list(images.shape[1:])) for images, _ in parts)
        raise ValueError(f"idx:{folder} holds images {shapes}; name the folder of one set")
    splits = [np.full(len(labels), split) for (_, labels), split in zip(parts, _IDX_SPLITS.values(), strict=True)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images[:, None], labels, np.concatenate(splits)


def _idx_part(folder: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(images [n, H, W], labels [n]) of one half."""
    images, labels = (_read_idx(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        problem = f"idx:{folder} holds {name} images {images.shape} with labels {labels.shape}"
        raise ValueError(f"{problem}; name the folder of images [n, H, W] with a label each")
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
        problem = f"emoji:{folder} has no emoji.json"
        raise FileNotFoundError(f"{problem}; npm install emoji-datasource-google@16.0.0 and name its folder")
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
        problem = f"{folder}/emoji.json is not as emoji-datasource-google 16.0.0 has it ({error!r})"
        raise ValueError(f"{problem}; name the folder of that package") from error


def _on_white(path: Path) -> NDArray[np.float64]:
    """The picture over a white ground, [3, 64, 64] in [0, 255]."""
    try:
        with need("PIL.Image", "emoji:").open(path) as image:
            pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
    except OSError as error:
        problem = f"{path} is no readable picture ({type(error).__name__})"
        raise ValueError(f"{problem}; npm install emoji-datasource-google@16.0.0 again") from error
    if pixels.shape[:2] != (_EMOJI_SIDE, _EMOJI_SIDE):
        problem = f"{path} is of {pixels.shape[0]}x{pixels.shape[1]} pixels"
        raise ValueError(f"{problem}; name the folder of emoji-datasource-google 16.0.0, whose are 64x64")
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


_SOURCES: dict[str, Callable[[str], _Arrays]] = {
    "sklearn": _sklearn,
    "npz": _npz,
    "idx": _idx,
    "emoji": _emoji,
    "folder": read_folder,
}
