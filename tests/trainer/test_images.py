import numpy as np
import pytest
import torch

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
