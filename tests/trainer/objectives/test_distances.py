"""Distances by their closed forms, and LPIPS from a TorchScript file."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from limbeck.trainer.objectives.distances import DistanceOptions, Lpips, PseudoHuber, l1, l2
from limbeck.trainer.objectives.options import ObjectiveConfig

A = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]], [[1.0, 1.0]]])
B = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]], [[1.0, 3.0]]])


def test_each_sample_has_its_closed_form():
    assert l2(A, B).tolist() == [(9 + 16) / 2, 0, 4 / 2]
    assert l1(A, B).tolist() == [(3 + 4) / 2, 0, 2 / 2]
    # sqrt(5^2 + 12^2) = 13: the norm is the whole sample's.
    assert PseudoHuber(12.0)(A, B).tolist() == pytest.approx([1, 0, 148**0.5 - 12], rel=1e-5)


def test_pseudo_huber_is_a_square_near_0_and_a_norm_far_away():
    u = torch.tensor([[3.0, -4.0]], dtype=torch.float64, requires_grad=True)
    assert PseudoHuber(1e4)(u, torch.zeros_like(u)).item() == pytest.approx(25 / 2e4, rel=1e-6)
    assert PseudoHuber(1e-6)(u, torch.zeros_like(u)).item() == pytest.approx(5, rel=1e-6)
    (gradient,) = torch.autograd.grad(PseudoHuber(12.0)(u, torch.zeros_like(u)).sum(), u)
    assert gradient.tolist() == [pytest.approx([3 / 13, -4 / 13])]
    # At 0, where a norm has no gradient, it is 0.
    at = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(PseudoHuber(0.1)(at, torch.zeros(1, 2)).sum(), at)
    assert gradient.tolist() == [[0, 0]]


class Perceptual(nn.Module):
    """Told as LPIPS is: a weighted mean over three channels of squares; [B, 1, 1, 1], as the published one answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert min(a.shape[2:]) >= 64
        return ((a - b).square().mean([2, 3]) * self.weight).sum(1)[:, None, None, None]


@pytest.fixture
def lpips(tmp_path):
    """A TorchScript file."""
    torch.jit.script(Perceptual()).save(tmp_path / "lpips.pt")
    return tmp_path / "lpips.pt"


def test_lpips_is_asked_as_the_file_wants(lpips):
    options = DistanceOptions(distance="lpips", lpips=lpips)
    grey, colour = options.make_distance((1, 8, 8)), options.make_distance((3, 64, 64))
    a, b = torch.zeros(2, 1, 8, 8, requires_grad=True), torch.full((2, 1, 8, 8), 0.5)
    b[1] = 1.0
    # Grey is shown as three channels, 8 x 8 as 64 x 64, which leaves a constant as it is.
    assert grey(a, b).tolist() == pytest.approx([7 * 0.25, 7.0])
    (gradient,) = torch.autograd.grad(grey(a, b)[0], a)
    assert gradient[0].sum().item() == pytest.approx(-7 * 2 * 0.5)
    assert gradient[1].abs().max() == 0
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1.0
    assert colour(red, torch.zeros_like(red)).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "shown"), [(28, 84), (32, 64), (64, 64), (80, 80)])
def test_lpips_is_shown_images_of_64_or_more(tmp_path, channels, size, shown):
    class Asked(nn.Module):
        """Not of perception: how large images are, and their mean difference."""

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a.shape[1] * 10_000 + a.shape[2] * 100 + a.shape[3] + 0 * (a - b).mean([1, 2, 3])

    torch.jit.script(Asked()).save(tmp_path / "asked.pt")
    a = torch.rand(2, channels, size, size)
    assert Lpips(tmp_path / "asked.pt", (channels, size, size))(a, a).tolist() == [30_000 + 101 * shown] * 2


class Published(nn.Module):
    """As the package lpips writes its own: torch.jit.script has no words for it, and takes traces of it alone."""

    def forward(self, a, b, per_layer=False):
        Outputs, found = namedtuple("Outputs", ["first", "second"]), {}
        one, two = (Outputs(image, image[:, :, ::2, ::2]) for image in (a, b))
        for layer in range(2):
            found[layer] = (one[layer] - two[layer]).square().mean([1, 2, 3], keepdim=True)
        total = found[0] + found[1]
        return (total, found) if per_layer else total


def test_a_traced_lpips_is_asked_of_any_images(tmp_path):
    with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
        torch.jit.script(Published())
    x = torch.zeros(1, 3, 64, 64)
    torch.jit.trace(Published(), (x, x)).save(tmp_path / "traced.pt")
    a = torch.full((5, 1, 40, 40), 0.5, requires_grad=True)
    found = Lpips(tmp_path / "traced.pt", (1, 40, 40))(a, torch.zeros(5, 1, 40, 40))
    assert found.tolist() == pytest.approx([2 * 0.25] * 5)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert gradient[0].sum().item() == pytest.approx(2 * 2 * 0.5)


def test_what_is_enlarged_is_the_same_picture(lpips):
    """A smooth one keeps its squares, channel by channel, and one channel is all three."""
    ramp = torch.linspace(-1, 1, 28).expand(28, 28)
    grey, colour = ramp.expand(1, 1, 28, 28), torch.stack([ramp, ramp.T, -ramp])[None]
    for picture in (grey, colour):
        shape = tuple(picture.shape[1:])
        (found,) = Lpips(lpips, shape)(picture, torch.zeros_like(picture)).tolist()
        assert found == pytest.approx(7 * ramp.square().mean().item(), rel=0.03)


def test_lpips_takes_no_gradients_of_its_own(lpips):
    asked = Lpips(lpips, (1, 8, 8))
    assert not any(parameter.requires_grad for parameter in asked._network.parameters())
    assert asked == Lpips(lpips, (1, 8, 8))  # so that a run that follows its dataset finds it unchanged
    other = Perceptual()
    nn.init.ones_(other.weight)
    torch.jit.script(other).save(lpips)
    assert asked != Lpips(lpips, (1, 8, 8))


def test_what_lpips_cannot_compare_and_files_that_are_none_are_told(lpips, tmp_path):
    with pytest.raises(ValueError, match=r"these samples are \[2\]; use l2"):
        Lpips(lpips, (2,))
    with pytest.raises(ValueError, match=r"lpips compares images \[1 or 3, H, W\], these samples are \[4, 8, 8\]"):
        Lpips(lpips, (4, 8, 8))
    (tmp_path / "other.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"other.pt is no TorchScript file .*; save one by torch.jit.trace\("):
        Lpips(tmp_path / "other.pt", (1, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"absent.pt is not there; name a TorchScript file of LPIPS, or use l2"):
        Lpips(tmp_path / "absent.pt", (1, 8, 8))


def test_the_options_name_the_distance(lpips):
    wide = DistanceOptions(distance="pseudo_huber", c=12.0).make_distance((1, 2))
    assert DistanceOptions().make_distance((1, 2)) is l2
    assert DistanceOptions(distance="l1").make_distance((1, 2)) is l1
    assert wide(A, B)[0].item() == pytest.approx(1)
    for wrong, told in [
        ({"distance": "pseudo_huber"}, "distance pseudo_huber needs its width: --objective.c 0.1, or choose l2"),
        ({"distance": "lpips"}, r"distance lpips needs its TorchScript file: --objective.lpips FILE .*, or choose l2"),
        ({"c": 0.1}, "c 0.1 belongs to distance pseudo_huber; add --objective.distance pseudo_huber, or leave it out"),
        ({"distance": "l1", "lpips": lpips}, "lpips.pt belongs to distance lpips; add --objective.distance lpips, or"),
    ]:
        with pytest.raises(ValueError, match=told):
            ObjectiveConfig(**wrong)
