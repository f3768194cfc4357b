"""`folder:PATH@32`: what everybody has, as a source of images."""

import io
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.diffusion.models import checkpoint
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.images import images_digest, summary
from limbeck.storage_schemas.program import COMMANDS
from limbeck.trainer.reading.images import load_images


def grey(value, size=(16, 16)):
    return Image.new("L", size, value)


def red(value, size=(16, 16)):
    return Image.new("RGB", size, (value, 0, 0))


def write(folder, pictures):
    """name -> picture, or bytes as they are."""
    for name, picture in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)
    return f"folder:{folder}"


def bytes_of(images):
    return ((images + 1) * 127.5).round().int()


def refusal(uri, split="all", kind=ValueError):
    """What is said of a folder that is refused, in one line."""
    with pytest.raises(kind) as error:
        load_images(uri, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_class_folders_in_sorted_order_are_the_labels(tmp_path):
    pictures = {
        "dog/1.png": red(30),
        "cat/b.png": red(20),
        "cat/a.png": red(10),
        "dog/0.png": red(40),
        "ox/x.png": red(50),
    }
    uri = write(tmp_path, pictures)
    images, labels = load_images(uri)
    assert images.shape == (5, 3, 16, 16)
    assert bytes_of(images)[:, 0, 3, 4].tolist() == [10, 20, 40, 30, 50]
    assert labels.tolist() == [0, 0, 1, 1, 2]
    # Every even file of a class: one that is alone in its class is trained on.
    train, reference = (load_images(uri, split) for split in ("train", "reference"))
    assert bytes_of(train[0])[:, 0, 0, 0].tolist() == [10, 40, 50]
    assert bytes_of(reference[0])[:, 0, 0, 0].tolist() == [20, 30]
    assert train[1].tolist() == [0, 1, 2]
    assert summary(uri, "train", train[0].numpy(), train[1].numpy()) == f"{uri}: 3 train images of 3x16x16, 3 classes"


def test_files_in_no_class_folder_have_no_labels(tmp_path):
    uri = write(tmp_path, {"b.png": grey(20), "a.PNG": grey(10), ".DS_Store": b"a program's own"})
    images, labels = load_images(uri)
    assert images.shape == (2, 1, 16, 16)
    assert bytes_of(images)[:, 0, 0, 0].tolist() == [10, 20]
    assert labels.tolist() == [-1, -1]
    assert summary(uri, "all", images.numpy(), labels.numpy()).endswith("2 all images of 1x16x16, no labels")


def test_the_digest_is_of_names_and_pixels_not_of_the_file_system(tmp_path):
    pictures = {f"{name}.png": red(value) for value, name in enumerate("abcdefgh", 10)}
    here = write(tmp_path / "here", pictures)
    there = write(tmp_path / "there", dict(reversed(pictures.items())))
    before, after = (images_digest(*(part.numpy() for part in load_images(uri))) for uri in (here, there))
    assert before == after
    write(tmp_path / "there", {"c.png": red(200)})
    assert images_digest(*(part.numpy() for part in load_images(there))) != before


@pytest.mark.parametrize("size", [(64, 32), (32, 64)])
def test_the_middle_is_cut_out_and_the_shorter_side_is_the_size(tmp_path, size):
    """A ramp of 2 a pixel along the longer side: of 64 pixels the middle 32 remain, from 16 on; each two become one."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8) * 2, (32, 64))
    picture = Image.fromarray(np.ascontiguousarray(ramp if size == (64, 32) else ramp.T))
    images, _ = load_images(write(tmp_path, {"a.png": picture}) + "@16")
    assert images.shape == (1, 1, 16, 16)
    along = bytes_of(images)[0, 0] if size == (64, 32) else bytes_of(images)[0, 0].T
    expected = (2 * (16 + 2 * torch.arange(16)) + 1).expand(16, 16)
    assert (along - expected)[:, 2:-2].abs().max() <= 1  # its edges see no further


def test_fine_stripes_average_out(tmp_path):
    """With an antialias: taking every fourth pixel would make them black or white."""
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    images, _ = load_images(write(tmp_path, {"a.png": Image.fromarray(stripes)}) + "@16")
    assert (bytes_of(images)[..., 2:-2] - 127).abs().max() <= 3


def test_small_ones_are_enlarged_and_long_ones_cost_no_memory(tmp_path):
    uri = write(tmp_path, {"a.png": grey(10, (4, 4)), "b.png": grey(20, (1, 40_000))})
    assert bytes_of(load_images(f"{uri}@32")[0])[:, 0, 9, 9].tolist() == [10, 20]


def test_all_grey_files_have_one_channel_and_one_in_colour_makes_all_rgb(tmp_path):
    several = {
        "1.png": Image.new("1", (8, 8), 1),
        "2.png": Image.new("LA", (8, 8), (100, 255)),
        "3.jpg": grey(60, (8, 8)),
        "4.webp": Image.new("RGB", (8, 8), (10, 200, 10)),
    }
    images, _ = load_images(write(tmp_path, several))
    assert images.shape == (4, 3, 8, 8)
    found = bytes_of(images)[:, :, 4, 4]
    assert (found - torch.tensor([[255] * 3, [100] * 3, [60] * 3, [10, 200, 10]])).abs().max() <= 3
    (tmp_path / "4.webp").unlink()
    assert bytes_of(load_images(f"folder:{tmp_path}")[0])[:, 0, 4, 4].tolist() == [255, 100, 60]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    if mode == "P":
        picture = Image.new("P", (8, 8), 0)
        picture.putpalette([200, 0, 0])
        picture.info["transparency"] = 0
        path = tmp_path / "a.png"
        picture.save(path, transparency=0)
        expected = 255
    else:
        picture = Image.new(mode, (8, 8), (0, 0, 0, 51)[-len(mode) :])
        write(tmp_path, {"a.png": picture})
        expected = 204  # 51/255 = 0.2 of black
    images, _ = load_images(f"folder:{tmp_path}")
    assert bytes_of(images).unique().tolist() == [expected]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_is_turned_as_its_camera_says(tmp_path, suffix):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white at the left, which is the top once it is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    images, _ = load_images(f"folder:{tmp_path}")
    assert images.shape == (1, 3, 32, 16)
    assert bytes_of(images)[0, 0, 4].float().mean() > 250 > 5 > bytes_of(images)[0, 0, 28].float().mean()


def encoded(picture, form="PNG", **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says it is as large as that."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
DAMAGED = {
    "text": b"no picture",
    "empty": b"",
    "cut.png": encoded(NOISE)[:-300],
    "cut.jpg": encoded(NOISE, "JPEG")[:-300],
    "cut.webp": encoded(NOISE, "WEBP")[:-300],
    "flipped": encoded(NOISE)[:900] + bytes(64) + encoded(NOISE)[964:],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n",
    "gif": encoded(NOISE, "GIF"),
    "bmp": encoded(NOISE, "BMP"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("size", ["", "@16"])
def test_a_file_that_is_no_picture_is_named(tmp_path, kind, size):
    uri = write(tmp_path, {"a.png": red(10, (32, 32)), "odd.png": DAMAGED[kind]})
    assert re.search(r"odd\.png is no readable PNG, JPEG or WebP file \(\w+\); save it again", refusal(uri + size))


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_named_before_anything_is_decoded(tmp_path, size):
    uri = write(tmp_path, {"a.png": DAMAGED["cut.png"], "odd.png": bomb(*size)})
    assert re.search(r"odd\.png has more than 89,\d{3},\d{3} pixels", refusal(uri))


def test_files_that_are_something_else_are_named(tmp_path):
    frames = [red(10), red(20)]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 100)
    for name, contents, found in (
        ("odd.webp", animated, "is animated"),
        ("odd.png", encoded(deep), "pixels of mode I"),
        ("labels.csv", b"a,0", "is no PNG, JPEG or WebP file; move it"),
        ("odd.tiff", encoded(NOISE, "TIFF"), "is no PNG, JPEG or WebP file; move it"),
    ):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        said = refusal(write(tmp_path / "set", {"a.png": red(10), name: contents}))
        assert name in said
        assert found in said
    os.mkfifo(tmp_path / "set" / "pipe.png")
    (tmp_path / "set" / "odd.tiff").unlink()
    assert "pipe.png is no PNG" in refusal(f"folder:{tmp_path}/set")


def test_folders_that_are_no_set_are_refused(tmp_path):
    assert "is no folder" in refusal(f"folder:{tmp_path}/none@32", kind=FileNotFoundError)
    assert "is empty" in refusal(f"folder:{tmp_path}")
    uri = write(tmp_path, {"cat/a.png": red(10), "dog/deep/b.png": red(20)})
    assert "dog/deep is a folder in a class folder" in refusal(uri)
    shutil.rmtree(tmp_path / "dog" / "deep")
    assert f"class folder {tmp_path}/dog is empty" in refusal(uri)
    write(tmp_path, {"dog/b.png": red(20, (16, 17))})
    assert "a.png has 16x16 pixels, b.png 16x17; " in refusal(uri)
    assert refusal(uri).endswith(f"such as folder:{tmp_path}@32")
    assert load_images(f"{uri}@8")[0].shape == (2, 3, 8, 8)
    write(tmp_path, {"stray.png": red(20)})
    assert "both class folders such as cat and files such as stray.png" in refusal(uri)


FIT = (
    *("--objective.name", "denoising", "--batch-size", "4", "--warmup", "0"),
    *("--network.width", "8", "--network.depth", "1", "--threads", "1"),
)


def fit(*words):
    return main(COMMANDS, ["fit", *FIT, *map(str, words)])


@pytest.mark.parametrize(("names", "classes"), [(("cat/1.png", "dog/2.png"), 2), (("1.png", "2.png"), None)])
def test_a_teacher_is_fitted_on_a_folder_that_stays_the_same(tmp_path, capsys, names, classes):
    uri, out = write(tmp_path / "set", {name: grey(place * 90) for place, name in enumerate(names)}), tmp_path / "out"
    assert fit("--images", uri + "@4", "--out", out, "--steps", 4) == 0
    count = 2 if classes else 1
    shown = f"{uri}@4: {count} train images of 1x4x4, {f'{classes} classes' if classes else 'no labels'}"
    assert capsys.readouterr().err.splitlines()[0] == shown
    saved = checkpoint.load(out / "model")
    assert (saved.model["num_classes"], saved.model["sample_shape"]) == (classes, [1, 4, 4])
    write(tmp_path / "set", {names[0]: grey(30)})
    assert fit("--images", uri + "@4", "--out", out, "--steps", 4) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "name those it read, or choose another --out" in line


def test_a_classifier_needs_labels(tmp_path, capsys):
    uri = write(tmp_path / "set", {f"{place}.png": grey(place * 90) for place in range(3)})
    words = ["classifier", "--images", uri, "--out", str(tmp_path / "out")]
    assert main(COMMANDS, words) == 2
    assert "has no labels to tell apart; name images with a class each" in capsys.readouterr().err
