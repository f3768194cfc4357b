import gzip
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.images import load_images


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
    np.savez(path, images=images, labels=np.arange(3), split=np.array(["reference", "train", "reference"]))
    reference, labels = load_images(f"npz:{path}", "reference")
    assert reference[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert labels.tolist() == [0, 2]
    assert load_images(f"npz:{path}", "train")[0][0, 0, 0, 0].item() == pytest.approx(-0.6)


def test_npz_without_a_split_is_cut_by_parity(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, images=np.zeros((5, 3, 4, 4), dtype=np.float32), labels=np.arange(5))
    assert load_images(f"npz:{path}", "train")[1].tolist() == [0, 2, 4]
    assert load_images(f"npz:{path}", "reference")[1].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": np.zeros((2, 1, 4, 4))}, "no array 'labels'"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2)}, r"save images \[n, C, H, W\]"),
        ({"images": np.full((2, 1, 4, 4), 200.0), "labels": np.zeros(2)}, "outside"),
        ({"images": np.full((2, 1, 4, 4), np.nan), "labels": np.zeros(2)}, "outside"),
        ({"images": np.zeros((1, 1, 4, 4)), "labels": np.zeros(1)}, "no reference images"),
    ],
)
def test_an_npz_that_is_no_image_set_is_refused(tmp_path, arrays, told):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=told):
        load_images(f"npz:{path}", "reference")


def test_unknown_sources_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for uri in ("mnist", "sklearn:faces", "http://x", f"npz:{tmp_path}/text.npz"):
        with pytest.raises(ValueError, match=r"; (use|name) ") as error:
            load_images(uri, "train")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_images("npz:nowhere.npz")


def test_an_npz_with_pickled_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, images=np.array([{}], dtype=object), labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"no readable \.npz"):
        load_images(f"npz:{path}")


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
        "t10k_labels": np.arange(reference) + 7,
    }


def test_idx_files_plain_or_gzipped_are_bytes_by_their_header(tmp_path):
    write_idx(tmp_path, packed=("train_images", "t10k_labels"), **halves())
    images, labels = load_images(f"idx:{tmp_path}")
    assert images.shape == (5, 1, 2, 3)
    np.testing.assert_allclose(images.flatten().numpy(), np.arange(30) / 127.5 - 1, rtol=0, atol=1e-7)
    assert labels.tolist() == [0, 1, 2, 7, 8]
    reference = load_images(f"idx:{tmp_path}", "reference")
    assert torch.equal(reference[0], images[3:])
    assert reference[1].tolist() == [7, 8]
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
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    write_emoji(tmp_path, [entry(name, f"class {n}") for n, name in enumerate(names)], dict.fromkeys(names, picture))
    expected = [n for n, name in enumerate(names) if hashlib.sha256(name.encode()).digest()[0] % 2 == 0]
    assert 0 < len(expected) < 8
    assert load_images(f"emoji:{tmp_path}@32", "train")[1].tolist() == expected
    assert load_images(f"emoji:{tmp_path}@32", "reference")[1].tolist() == sorted({*range(8)} - {*expected})


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
