"""Distances of samples from real data, and of a student's outputs from its teacher's. Everything is summed in float64.

Images are on the CPU. A classifier's features, and distances between them, are computed on the device it is on.
"""

import math

import torch
from torch import Tensor, nn

from limbeck.diffusion import noise
from limbeck.storage_schemas.extras import need
from limbeck.trainer.classifier import Classifier

_PROJECTIONS = 128
_SEED = 0
_NEIGHBOURS = 5


def holdout_error(outputs: Tensor, targets: Tensor) -> float:
    """Mean squared error per dimension against the teacher's outputs for the same noise, both [n, ...]."""
    return (outputs.double() - targets.double()).square().mean().item()


def variance(samples: Tensor) -> float:
    """Variance per dimension of [n, ...]: the holdout error of always answering the mean."""
    return samples.double().var(dim=0, unbiased=False).mean().item()


class Frechet:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) between `reference` and images, of a classifier's features.

    Heusel et al. 2017 (FID), with a small classifier of the same data in place of Inception.
    """

    def __init__(self, classifier: Classifier, reference: Tensor) -> None:
        fid = need("torchmetrics.image.fid", "the Frechet distance")
        self._distance = fid.FrechetInceptionDistance(feature=_Features(classifier), reset_real_features=False)
        self._update(reference, real=True)

    def __call__(self, images: Tensor) -> float:
        """The distance of images [n, C, H, W], n >= 2."""
        self._distance.reset()
        self._update(images, real=False)
        return float(self._distance.compute())

    @torch.no_grad()
    def _update(self, images: Tensor, *, real: bool) -> None:
        for batch in images.split(1024):
            self._distance.update(batch, real=real)


class _Features(nn.Module):
    """A feature network as torchmetrics wants it: its width and float64 features."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.on_device(images).to(images.device)

    def on_device(self, images: Tensor) -> Tensor:
        """The features, left where the classifier is."""
        device = next((weights.device for weights in self.classifier.parameters()), images.device)
        return self.classifier.features(images.to(device, torch.float32)).double()


class Neighbours:
    """Density and coverage of samples y around the `reference` x, in a classifier's features.

    B_i is the open ball around x_i that reaches to its k-th nearest neighbour among the other x, k = 5:
    density = 1/(k m) sum_ij [y_j in B_i], which may pass 1, and coverage = 1/n sum_i [some y_j in B_i].
    In place of precision and recall, of which one outlier may spoil either. Naeem et al. 2020, section 3.
    """

    def __init__(self, classifier: Classifier, reference: Tensor, *, k: int = _NEIGHBOURS) -> None:
        if len(reference) <= k:
            raise ValueError(f"{len(reference)} reference images have no {k} neighbours each; name a source with more")
        self._k, self._features = k, _Features(classifier)
        self._reference = self._of(reference)
        self._radii = torch.cat([_nearest(part, self._reference, k) for part in self._reference.split(1024)])

    def __call__(self, images: Tensor) -> tuple[float, float]:
        """(density, coverage) of images [m, C, H, W]."""
        samples, inside = self._of(images), torch.zeros_like(self._radii, dtype=torch.int64)
        for part in samples.split(1024):
            inside += (_distances(part, self._reference) < self._radii).sum(dim=0)
        return inside.sum().item() / (self._k * len(samples)), (inside > 0).double().mean().item()

    @torch.no_grad()
    def _of(self, images: Tensor) -> Tensor:
        return torch.cat([self._features.on_device(batch) for batch in images.split(1024)])


def _nearest(some: Tensor, points: Tensor, k: int) -> Tensor:
    """The distance of each of `some` of the points to its k-th nearest other one."""
    return _distances(some, points).kthvalue(k + 1, dim=1).values


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences: the product form would lose the small ones.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """SW_2 between samples [n, ...] and [m, ...]: sqrt(mean over directions of W_2^2 of their projections).

    The directions are fixed, so that one number can be compared with another. In up to 128 dimensions they are whole
    orthonormal bases, so that a set translated by c is at exactly |c|/sqrt(d). Rabin et al. 2011; Bonneel et al. 2015.
    """
    directions = _directions(a[0].numel())
    squares = wasserstein_squared(a.flatten(1).double() @ directions, b.flatten(1).double() @ directions)
    return squares.mean().sqrt().item()


def wasserstein_squared(a: Tensor, b: Tensor) -> Tensor:
    """W_2^2 of each column's two one-dimensional samples, [n, k] and [m, k] -> [k]: the integral of (F^-1 - G^-1)^2."""
    n, m = len(a), len(b)
    # Both quantile functions are steps; in units of 1/(n m) every step ends at a whole number.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    gaps = a.sort(dim=0).values[(ends - 1) // m] - b.sort(dim=0).values[(ends - 1) // n]
    return (widths[:, None] * gaps.square()).sum(dim=0)


def _directions(size: int) -> Tensor:
    """At least 128 unit vectors in `size` dimensions, in orthonormal sets: float64 [size, k]."""
    together = min(size, _PROJECTIONS)
    sets = math.ceil(_PROJECTIONS / together)
    normal = torch.from_numpy(noise.standard_normal(_SEED, "train", range(sets), (size, together)))
    return torch.cat([torch.linalg.qr(block).Q for block in normal], dim=1)
