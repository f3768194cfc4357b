import json

import numpy as np
import pytest
import torch

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.storage_schemas.errors import UsageError
from limbeck.trainer.classifier import (
    ClassifierConfig,
    accuracy,
    load_classifier,
    run_classifier,
    shipped_classifier,
    shipped_image_source,
)
from limbeck.trainer.reading.images import load_images


@pytest.fixture(scope="module")
def shipped():
    return shipped_classifier("sklearn:digits", (1, 8, 8))


def test_the_shipped_classifier_is_as_accurate_as_it_says(shipped):
    classifier, saved = shipped
    measured = accuracy(classifier, *load_images("sklearn:digits", "reference"))
    assert measured >= 0.97
    assert measured == pytest.approx(saved.about["figures"]["accuracy"], abs=2 / 898)
    assert "CC BY 4.0" in saved.about["licence"]
    assert len(saved.weights) < 300_000


def test_features_are_the_layer_that_the_head_reads(shipped):
    classifier, _ = shipped
    images, _ = load_images("sklearn:digits", "reference")
    features = classifier.features(images[:5])
    assert features.shape == (5, classifier.num_features)
    assert torch.equal(classifier.head(features), classifier(images[:5]))
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_there_is_a_classifier_only_for_the_data_it_was_fitted_on():
    assert shipped_classifier("sklearn:digits", (1, 16, 16)) is None
    assert shipped_classifier("npz:other.npz", (1, 8, 8)) is None
    assert shipped_image_source((1, 8, 8)) == "sklearn:digits"
    assert shipped_image_source((2,)) is None


@pytest.fixture
def stripes(tmp_path):
    """Two classes that a pixel tells apart: bright above or bright below, with noise."""
    labels = np.arange(128) // 2 % 2
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (128, 2, 5, 6)).astype(np.float32)
    images[labels == 0, :, :2] += 0.5
    images[labels == 1, :, 3:] += 0.5
    np.savez(tmp_path / "stripes.npz", images=images, labels=labels)
    return f"npz:{tmp_path}/stripes.npz"


def test_the_command_fits_saves_and_gives_the_same_bytes_again(tmp_path, stripes):
    config = {"images": stripes, "steps": 60, "batch_size": 32, "lr": 0.02, "width": 8, "num_features": 8, "seed": 3}
    before = torch.get_rng_state()
    for name in ("a", "b"):
        assert run_classifier(ClassifierConfig(out=tmp_path / name, **config)) == 0
    assert torch.equal(torch.get_rng_state(), before)
    classifier, saved = load_classifier(tmp_path / "a")
    assert accuracy(classifier, *load_images(stripes, "reference")) == saved.about["figures"]["accuracy"] == 1.0
    assert saved.weights == load_classifier(tmp_path / "b")[1].weights
    assert "--steps 60" in saved.about["command"]
    assert json.loads((tmp_path / "a" / "model.json").read_text())["model"]["sample_shape"] == [2, 5, 6]


def test_a_model_of_another_kind_is_refused(tmp_path):
    checkpoint.save(builtin_checkpoint("gaussian"), tmp_path)
    with pytest.raises(UsageError, match="is a 'gaussian' model"):
        load_classifier(tmp_path)


def test_too_small_images_are_refused(tmp_path):
    np.savez(tmp_path / "dots.npz", images=np.full((4, 1, 2, 2), -0.5), labels=np.zeros(4))
    with pytest.raises(UsageError, match="4x4 or more"):
        run_classifier(ClassifierConfig(out=tmp_path, images=f"npz:{tmp_path}/dots.npz", steps=1))
