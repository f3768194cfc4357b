import gzip
import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.trainer.reading.images import load_images


def test_digits_are_the_pixels_of_scikit_learn_in_two_halves():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = load_images("sklearn:digits")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal((images[:, 0].numpy() + 1) * 8, digits.images)
    np.testing.assert_array_equal(labels.numpy(), digits.target)
    train, reference = load_images("sklearn:digits", "train"), load_images("sklearn:digits", "reference")
    assert torch.equal(train[0], images[0::2])
    assert torch.equal(reference[0], images[1::2])
    assert torch.equal(reference[1], labels[1::2])


def test_npz_scales_bytes_and_follows_its_own_split(tmp_path):
    path = tmp_path / "tiny.npz"
    images = np.array([0, 51, 255], dtype=np.uint8).reshape(3, 1, 1, 1).repeat(4, 2).repeat(4, 3)
    np.savez(path, images=images, labels=np.array([0, 0, 0]), split=np.array(["reference", "train", "reference"]))
    reference, labels = load_images(f"npz:{path}", "reference")
    assert reference[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert labels.tolist() == [0, 0]
    assert load_images(f"npz:{path}", "train")[0][0, 0, 0, 0].item() == pytest.approx(-0.6)


def test_npz_without_a_split_is_cut_by_parity(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, images=np.full((5, 3, 4, 4), -0.5, dtype=np.float32), labels=np.array([0, 1, 2, 0, 1]))
    assert load_images(f"npz:{path}", "train")[1].tolist() == [0, 2, 1]
    assert load_images(f"npz:{path}", "reference")[1].tolist() == [1, 0]


PIXELS = np.linspace(-1, 1, 8 * 16).reshape(8, 1, 4, 4)
LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 0])


def saved(tmp_path, **changed):
    arrays = {"images": PIXELS, "labels": LABELS} | changed
    np.savez(tmp_path / "some.npz", **{name: values for name, values in arrays.items() if values is not None})
    return f"npz:{tmp_path}/some.npz"


def refusal(uri, split="train", kind=ValueError):
    """What is said of a source that is refused, in one line."""
    with pytest.raises(kind) as error:
        load_images(uri, split)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS.astype(np.float64), LABELS.astype(np.uint8), np.minimum(LABELS, 1) > 0]
)
def test_labels_may_be_of_any_type_that_counts_classes(tmp_path, labels):
    assert load_images(saved(tmp_path, labels=labels))[1].tolist() == [int(label) for label in labels]


def test_images_without_labels_say_so_by_minus_one(tmp_path):
    assert load_images(saved(tmp_path, labels=np.full(8, -1)), "train")[1].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (LABELS + 1, "1, 2, 3"),
        (LABELS * 100_000, "0, 100000, 200000"),
        (LABELS - 1, "-1, 0, 1"),
        (LABELS + 0.5, "0.5, 1.5, 2.5"),
        (np.where(LABELS == 1, np.nan, LABELS), "0.0, 2.0, nan"),
        (np.array(["cat", "dog"])[LABELS % 2], "cat, dog"),
        (np.arange(8) * 10, "0, 10, 20, ..., 70"),
        (LABELS.astype(np.complex64), r"\(1\+0j\), \(2\+0j\), 0j"),
    ],
)
@pytest.mark.parametrize("split", ["train", "reference", "all"])
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, found, split):
    said = refusal(saved(tmp_path, labels=labels), split)
    assert re.search(f"has labels (?:{found}); classes are 0 to n - 1, with images of each", said)
    assert "numpy.unique(labels, return_inverse=True)[1]" in said


@pytest.mark.parametrize("labels", [LABELS[:7], np.eye(3)[LABELS], np.array(0)])
def test_labels_of_another_shape_are_refused(tmp_path, labels):
    assert "labels [n]" in refusal(saved(tmp_path, labels=labels))


def test_a_class_with_no_image_to_train_on_is_refused(tmp_path):
    uri = saved(tmp_path, labels=np.array([0, 1, 0, 1, 0, 1, 0, 1]))
    assert "no train image of class 1" in refusal(uri)
    assert load_images(uri, "reference")[1].tolist() == [1, 1, 1, 1]
    uri = saved(tmp_path, split=np.array(["train", "val"] * 4))
    assert "has a split 'val'" in refusal(uri)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (PIXELS[:, 0], r"save images \[n, C, H, W\]"),
        (PIXELS[:, :, :0], "holds no images"),
        (PIXELS * 200, r"from -200 to 200, outside \[-1, 1\]"),
        (np.where(PIXELS > 0.9, np.nan, PIXELS), "NaN or infinity in 1 of 8 images"),
        (np.where(PIXELS < -0.9, -np.inf, PIXELS), "NaN or infinity in 1 of 8 images"),
        (PIXELS / 2 + 0.5, r"from 0 to 1, none below 0, .*; save images \* 2 - 1"),
        ((PIXELS > 0).astype(np.uint8), r"bytes from 0 to 1, and white is 255; save images \* 255"),
        ((PIXELS > 0).astype(np.int64), "images of int64; save them as uint8"),
        (PIXELS > 0, "images of bool"),
        (PIXELS.astype(np.complex64), "images of complex64"),
        (PIXELS.astype(str), "images of <U"),
        (PIXELS.astype(object), "pickled objects, which are not loaded"),
    ],
)
def test_images_that_mean_something_else_are_refused(tmp_path, images, found):
    assert re.search(found, refusal(saved(tmp_path, images=images)))


@pytest.mark.parametrize(
    ("shape", "refused"),
    [
        ((32, 32, 3), True),
        ((28, 28, 1), True),
        ((16, 16, 4), True),
        ((24, 32, 3), True),
        ((4, 4, 3), True),
        ((3, 32, 32), False),
        ((1, 28, 28), False),
        ((4, 16, 16), False),
        ((16, 4, 4), False),
        ((1, 8, 1), False),
        ((3, 4, 4), False),
        ((2, 1, 1), False),
        ((1, 1, 1), False),
    ],
)
def test_channels_come_before_rows_and_columns(tmp_path, shape, refused):
    images = np.linspace(-1, 1, 8 * math.prod(shape)).reshape(8, *shape)
    uri = saved(tmp_path, images=images)
    if refused:
        assert "save images.transpose(0, 3, 1, 2)" in refusal(uri)
    else:
        assert load_images(uri)[0].shape == images.shape


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("how", ["cut", "zeroed"])
def test_a_damaged_npz_is_refused_in_one_line(tmp_path, where, how):
    np.savez_compressed(tmp_path / "some.npz", images=np.random.uniform(-1, 1, (8, 1, 4, 4)), labels=LABELS)
    path = tmp_path / "some.npz"
    data = bytearray(path.read_bytes())
    place = int(where * len(data))
    if how == "cut":
        del data[place:]
    else:
        data[place : place + 40] = bytes(40)
    path.write_bytes(data)
    assert "is no readable .npz" in refusal(f"npz:{path}")


def test_unknown_sources_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for uri in ("mnist", "sklearn:faces", "http://x", f"npz:{tmp_path}/text.npz"):
        assert re.search(r"; (use|name) ", refusal(uri))
    assert refusal(str(tmp_path)).endswith(f"did you mean folder:{tmp_path}@32?")
    assert "is no file" in refusal("npz:nowhere.npz", kind=FileNotFoundError)


def idx(values):
    """As LeCun's files have it: two zeros, 8 for bytes, the number of dimensions, each dimension big-endian."""
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes() + values.tobytes()


def write_idx(folder, *, packed=(), **arrays):
    for name, values in arrays.items():
        file = name.replace("_", "-") + ("-idx3-ubyte" if "images" in name else "-idx1-ubyte")
        data = idx(values.astype(np.uint8))
        if name in packed:
            (folder / f"{file}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / file).write_bytes(data)


def halves(train=3, reference=2):
    pixels = np.arange((train + reference) * 6).reshape(-1, 2, 3)
    return {
        "train_images": pixels[:train],
        "train_labels": np.arange(train),
        "t10k_images": pixels[train:],
        "t10k_labels": np.arange(reference) + 1,
    }


def test_idx_files_plain_or_gzipped_are_bytes_by_their_header(tmp_path):
    write_idx(tmp_path, packed=("train_images", "t10k_labels"), **halves())
    images, labels = load_images(f"idx:{tmp_path}")
    assert images.shape == (5, 1, 2, 3)
    np.testing.assert_allclose(images.flatten().numpy(), np.arange(30) / 127.5 - 1, rtol=0, atol=1e-7)
    assert labels.tolist() == [0, 1, 2, 1, 2]
    reference = load_images(f"idx:{tmp_path}", "reference")
    assert torch.equal(reference[0], images[3:])
    assert reference[1].tolist() == [1, 2]
    assert load_images(f"idx:{tmp_path}", "train")[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"train_labels": np.arange(2)}, r"train images \(3, 2, 3\) with labels \(2,\)"),
        ({"t10k_images": np.zeros((2, 4, 4))}, r"\[2, 3\] and \[4, 4\]"),
        ({"t10k_labels": None}, "has no t10k-labels-idx1-ubyte or"),
    ],
)
def test_idx_folders_that_are_no_set_are_refused(tmp_path, changed, told):
    arrays = {name: values for name, values in (halves() | changed).items() if values is not None}
    write_idx(tmp_path, **arrays)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        load_images(f"idx:{tmp_path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("damage", [b"", b"\0\0\x0d\x01", b"\0\0\x08\x03\0\0", "cut", "more"])
def test_a_damaged_idx_file_is_refused(tmp_path, name, damage):
    write_idx(tmp_path, **halves())
    whole = (tmp_path / name).read_bytes()
    changed = {"cut": whole[:-1], "more": whole + b"\0"}.get(damage, damage)
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(ValueError, match="no whole IDX file"):
        load_images(f"idx:{tmp_path}")


def test_a_cut_gzip_is_refused(tmp_path):
    write_idx(tmp_path, packed=("train_images",), **halves())
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole IDX file"):
        load_images(f"idx:{tmp_path}")


def write_emoji(folder, entries, pictures):
    """emoji.json and img/google/64 as the npm package has them."""
    (folder / "img/google/64").mkdir(parents=True)
    (folder / "emoji.json").write_text(json.dumps(entries))
    for name, picture in pictures.items():
        picture.save(folder / "img/google/64" / name)


def entry(image, category, *tones, has=True):
    variations = {str(n): {"image": tone, "has_img_google": True} for n, tone in enumerate(tones)}
    return {"image": image, "category": category, "has_img_google": has, "skin_variations": variations}


def test_emoji_are_laid_on_white_and_averaged_in_boxes(tmp_path):
    # Columns in turn: solid red, and black at an alpha of 51/255 = 0.2.
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, 0::2] = (255, 0, 0, 255)
    pixels[:, 1::2] = (0, 0, 0, 51)
    grey = Image.new("LA", (64, 64), (100, 255))
    entries = [
        entry("b.png", "Smileys", "b-1.png", "b-2.png"),
        entry("a.png", "Flags"),
        entry("none.png", "Flags", has=False),
    ]
    solid = {name: Image.new("RGBA", (64, 64), (0, 255, 0, 255)) for name in ("b-1.png", "b-2.png")}
    write_emoji(tmp_path, entries, {"a.png": Image.fromarray(pixels), "b.png": grey, **solid})
    images, labels = load_images(f"emoji:{tmp_path}@64")
    assert images.shape == (4, 3, 64, 64)
    assert labels.tolist() == [0, 1, 1, 1]  # Flags, Smileys; in order of the files: a, b-1, b-2, b
    np.testing.assert_allclose(images[0, :, 5, 0].numpy(), [1, -1, -1])
    np.testing.assert_allclose(images[0, :, 5, 1].numpy(), 204 / 127.5 - 1, atol=1e-7)
    np.testing.assert_allclose(images[3].numpy(), 100 / 127.5 - 1, atol=1e-7)
    small, _ = load_images(f"emoji:{tmp_path}")
    assert small.shape == (4, 3, 32, 32)
    np.testing.assert_allclose(small[0, :, 3, 4].numpy(), np.array([229.5, 102, 102]) / 127.5 - 1, atol=1e-7)


def test_emoji_are_split_by_a_hash_of_their_file(tmp_path):
    names = [f"{number:04x}.png" for number in range(8)]
    pictures = {name: Image.new("RGBA", (64, 64), (n, 0, 0, 255)) for n, name in enumerate(names)}
    write_emoji(tmp_path, [entry(name, "all") for name in names], pictures)
    expected = [n for n, name in enumerate(names) if hashlib.sha256(name.encode()).digest()[0] % 2 == 0]
    assert 0 < len(expected) < 8
    for split, which in (("train", expected), ("reference", sorted({*range(8)} - {*expected}))):
        red = load_images(f"emoji:{tmp_path}@32", split)[0][:, 0, 0, 0]
        assert ((red + 1) * 127.5).round().tolist() == which


def test_folders_that_are_not_the_package_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no emoji\.json; npm install emoji-datasource-google"):
        load_images(f"emoji:{tmp_path}")
    picture = Image.new("RGBA", (64, 64))
    write_emoji(tmp_path, [entry("a.png", "Flags")], {"a.png": picture})
    with pytest.raises(ValueError, match="asks for 48 pixels; use @32 or @64"):
        load_images(f"emoji:{tmp_path}@48")
    picture.resize((32, 32)).save(tmp_path / "img/google/64/a.png")
    with pytest.raises(ValueError, match=r"a\.png is of 32x32 pixels"):
        load_images(f"emoji:{tmp_path}")
    (tmp_path / "img/google/64/a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png is no readable picture"):
        load_images(f"emoji:{tmp_path}")
    (tmp_path / "emoji.json").write_text('[{"image": "a.png"}]')
    with pytest.raises(ValueError, match=r"emoji\.json is not as"):
        load_images(f"emoji:{tmp_path}")
