"""A small classifier of real images: its penultimate layer is the space in which Frechet distances are taken.

    limbeck classifier --out trainer/builtin/digits_classifier

fits it on the train half of an image source, and says its accuracy on the reference half. The one for sklearn:digits
is in the package. The folder is a native checkpoint (diffusion/models/checkpoint.py) of kind "classifier".
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.spec import usable
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.errors import UsageError, usage_errors
from limbeck.storage_schemas.images import KINDS, num_classes
from limbeck.storage_schemas.places import LocalPath, Source
from limbeck.trainer.reading.images import load_images

_AT_ONCE = 1024
_BUILTIN = Path(__file__).parent / "builtin"

_LICENCES = {
    "sklearn:digits": "Fitted on scikit-learn's digits: the test set of Optical Recognition of Handwritten Digits, "
    "E. Alpaydin and C. Kaynak 1998, UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0. "
    "The weights are under this package's licence.",
}


class Classifier(nn.Module):
    """Two pooled stages of convolutions and one hidden layer, for images [B, C, H, W] with H and W at least 4."""

    def __init__(self, *, sample_shape: tuple[int, ...], num_classes: int, width: int, num_features: int) -> None:
        super().__init__()
        if len(sample_shape) != 3 or min(sample_shape[1:]) < 4:
            raise ValueError(f"a classifier needs images [C, H, W] of 4x4 or more, these are {list(sample_shape)}")
        channels, height, columns = sample_shape
        self.num_features = num_features
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * (height // 4) * (columns // 4), num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.body(images))

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, [B, num_features]."""
        return self.body(images)


class ClassifierConfig(Config):
    """Fit the classifier in whose features evaluate measures the Frechet distance."""

    out: LocalPath = Field(description="Folder to write model.json and model.safetensors to.")
    images: Source = Field("sklearn:digits", description=f"Images to learn from: {KINDS}.")
    width: int = Field(32, ge=1, description="Channels of the first stage; the second has twice as many.")
    num_features: int = Field(64, ge=2, description="Size of the penultimate layer.")
    steps: int = Field(1500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(128, ge=1, description="Images of a step.")
    lr: float = Field(2e-3, gt=0, description="First learning rate of AdamW; it falls to 0 as a cosine.")
    weight_decay: float = Field(1e-2, ge=0, description="Weight decay of AdamW.")
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="Probability spread over the other classes.")
    seed: int = Field(0, ge=0, description="Seed of the weights, the batches and the dropout.")
    device: str = Field("cpu", description="Device: auto, cpu, cuda, cuda:1, ...")


def run_classifier(config: ClassifierConfig) -> int:
    """The command: fit, measure on the reference half, save, say."""
    with usage_errors():
        config = config.model_copy(update={"device": str(pick_device(config.device))})
        train, reference = load_images(config.images, "train"), load_images(config.images, "reference")
        spec = classifier_spec(config, *train)
        classifier = fit_classifier(config, spec, *train)
    figures = {"accuracy": accuracy(classifier, *reference), "train_accuracy": accuracy(classifier, *train)}
    counts = {"train_images": len(train[0]), "reference_images": len(reference[0])}
    about = {"figures": {**figures, **counts}, **_lineage(config)}
    checkpoint.save(Checkpoint(spec, checkpoint.pack(classifier), about=about), config.out)
    print(f"{config.out}: {figures['accuracy']:.4f} of {len(reference[0])} reference images classified rightly")
    return 0


def classifier_spec(config: ClassifierConfig, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The spec in model.json of a classifier for these images."""
    classes = num_classes(labels.numpy())
    if classes is None:
        raise ValueError(f"{config.images} has no labels to tell apart; name images with a class each")
    shape = {"sample_shape": list(images.shape[1:]), "num_classes": classes}
    size = {"width": config.width, "num_features": config.num_features}
    return {"kind": "classifier", "images": config.images, **shape, **size}


def fit_classifier(config: ClassifierConfig, spec: dict[str, Any], images: Tensor, labels: Tensor) -> Classifier:
    """A classifier by AdamW on cross entropy, from `seed` alone; the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = _build(spec).train().to(config.device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        for _ in range(config.steps):
            rows = torch.randint(len(images), (config.batch_size,))
            optimizer.zero_grad()
            loss(classifier(images[rows].to(config.device)), labels[rows].to(config.device)).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images whose likeliest class is their label."""
    device = next(classifier.parameters()).device
    found = torch.cat([classifier(part.to(device)).argmax(dim=1).cpu() for part in images.split(_AT_ONCE)])
    return (found == labels).double().mean().item()


def load_classifier(folder: str | Path) -> tuple[Classifier, Checkpoint]:
    """A saved classifier, in evaluation mode and without gradients, and its checkpoint."""
    saved = checkpoint.load(folder)
    if saved.model.get("kind") != "classifier":
        raise UsageError(f"{folder} is a {saved.model.get('kind')!r} model; name one of limbeck classifier")
    classifier = checkpoint.filled(lambda: _build(saved.model), saved)
    assert isinstance(classifier, Classifier)
    return classifier.eval().requires_grad_(False), saved


def shipped_classifier(images: str, sample_shape: tuple[int, ...]) -> tuple[Classifier, Checkpoint] | None:
    """The classifier in this package for an image source and a shape, or None where there is none."""
    for folder, model in _shipped():
        if (model["images"], tuple(model["sample_shape"])) == (images, sample_shape):
            return load_classifier(folder)
    return None


def shipped_image_source(sample_shape: tuple[int, ...]) -> str | None:
    """The image source that a classifier in this package was fitted on, for samples of this shape; None without one."""
    return next((model["images"] for _, model in _shipped() if tuple(model["sample_shape"]) == sample_shape), None)


def _shipped() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(_BUILTIN.glob(f"*/{checkpoint.MODEL_FILE}")):
        yield path.parent, json.loads(path.read_text())["model"]


def _build(spec: dict[str, Any]) -> Classifier:
    with usable("the classifier"):
        return Classifier(
            sample_shape=tuple(spec["sample_shape"]),
            num_classes=spec["num_classes"],
            width=spec["width"],
            num_features=spec["num_features"],
        )


def _lineage(config: ClassifierConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"out"})
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    return {
        "seed": config.seed,
        "command": f"limbeck classifier --out FOLDER {flags}",
        "licence": _LICENCES.get(config.images, f"Fitted on {config.images}; its licence is that of its source."),
    }
