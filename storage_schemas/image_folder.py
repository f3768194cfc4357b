"""A plain folder of PNG, JPEG and WebP files as an image source, `folder:PATH@32`.

Files directly in PATH have no labels; those in class folders have their folder's place in sorted order. Each is turned
as its EXIF says, laid on white where it is transparent, cut to its middle square and resized (bicubic, antialiased) to
SIZExSIZE: the shorter side becomes SIZE. Without @SIZE all files must have one size already, which they keep. They are
grey, [1, H, W], if all of them are, else RGB.

Headers are read first, so that what can't be used is refused before anything is decoded. `train` is every even file of
a class and `reference` every odd one.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.storage_schemas.extras import need

FORMATS = ("PNG", "JPEG", "WEBP")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_TRANSPARENT = ("LA", "PA", "RGBA")
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_ANIMATED = ("PNG", "WEBP")  # a JPEG of several is a photograph with its preview: the first is the picture
_SMALL = 32
"""A size to name where none is given."""


@dataclass(frozen=True)
class _Header:
    """What a file says of itself: (width, height) as it is shown, and whether it is grey."""

    size: tuple[int, int]
    is_grey: bool


def read_folder(rest: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.str_]]:
    """(images uint8 [n, C, H, W], labels [n], -1 where there are none, splits [n]) of PATH or PATH@SIZE."""
    match = re.fullmatch(r"(.+?)(?:@([1-9]\d{0,3}))?", rest)
    folder, side = (Path(match[1]), int(match[2] or 0)) if match else (Path(rest), 0)
    files = _listed(folder)
    headers = [_header(path) for path, _ in files]
    width, height = (side, side) if side else _common_size(folder, files, headers)
    channels = 1 if all(header.is_grey for header in headers) else 3
    images = np.empty((len(files), channels, height, width), np.uint8)
    for row, (path, _) in enumerate(files):
        images[row] = _pixels(path, (width, height), channels)
    labels = np.array([label for _, label in files], np.int64)
    return images, labels, _splits(labels)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _listed(folder: Path) -> list[tuple[Path, int]]:
    """(file, label) of each file in sorted order of names, which is the same on every file system."""
    name = f"folder:{folder}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is no folder; name one of {_formats()} files")
    entries = _entries(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    if folders and len(folders) < len(entries):
        stray = next(entry.name for entry in entries if not entry.is_dir())
        problem = f"{name} holds both class folders such as {folders[0].name} and files such as {stray}"
        raise ValueError(f"{problem}; keep either: files in class folders have labels, those beside them none")
    if not entries:
        raise ValueError(f"{name} is empty; name a folder of {_formats()} files")
    if not folders:
        return [(_checked(entry), -1) for entry in entries]
    return [(_checked(entry), label) for label, each in enumerate(folders) for entry in _class_files(each)]


def _class_files(folder: Path) -> list[Path]:
    files = _entries(folder)
    if not files:
        raise ValueError(f"class folder {folder} is empty; every class needs images, so take it away")
    return files


def _entries(folder: Path) -> list[Path]:
    """Entries sorted by name, without hidden ones, which programs leave behind."""
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder in a class folder; put its files into the class folder itself")
    if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} is no {_formats()} file; move it elsewhere, or save it as one")
    return path


def _formats() -> str:
    return "PNG, JPEG or WebP"


def _header(path: Path) -> _Header:
    with _opened(path) as image:
        is_animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
        # Only from the header: PIL would decode a whole PNG to find an orientation at its end.
        orientation = image.getexif().get(_ORIENTATION) if "exif" in image.info else None
        size = image.size[::-1] if orientation in _TURNED else image.size
    if image.mode not in (*_GREY, *_COLOUR):
        raise ValueError(f"{path} has pixels of mode {image.mode}; save it with 8 bits a channel")
    if is_animated:
        raise ValueError(f"{path} is animated; save one picture of it")
    return _Header(size, image.mode in _GREY)


def _common_size(folder: Path, files: list[tuple[Path, int]], headers: list[_Header]) -> tuple[int, int]:
    first = headers[0].size
    for (path, _), header in zip(files, headers, strict=True):
        if header.size != first:
            problem = f"{files[0][0].name} has {_by(first)} pixels, {path.name} {_by(header.size)}"
            raise ValueError(f"folder:{folder}: {problem}; say what to make of all, such as folder:{folder}@{_SMALL}")
    return first


def _pixels(path: Path, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """[channels, height, width] of one file."""
    from PIL import Image, ImageOps

    with _opened(path) as opened:
        image = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
        if image.mode in _TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(size[1], size[0], channels).transpose(2, 0, 1)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The picture, not decoded yet. Whatever PIL says of a file becomes one line with its name."""
    Image = need("PIL.Image", "folder:")  # noqa: N806
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", module="PIL", category=UserWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{path} has more than {limit} pixels; save it smaller") from None
    except Exception as error:  # of PIL, zlib and struct, by a dozen names
        raise ValueError(f"{path} is no readable {_formats()} file ({type(error).__name__}); save it again") from error


def _splits(labels: NDArray[np.int64]) -> NDArray[np.str_]:
    """Every even file of a class and every odd one, so that a class of one file can be trained on."""
    place = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[rows] = np.arange(len(rows))
    return np.where(place % 2 == 0, "train", "reference")
