"""A network as a denoiser: (x_t, t, condition) -> x_0."""

import torch
from torch import Tensor, nn

from limbeck.diffusion.prediction import Prediction
from limbeck.diffusion.process import Process, expand, scales


class Denoiser(nn.Module):
    """mu(x_t, t): the x_0 that a network's prediction says, for 0 < sigma_t.

    x_t: [B, ...]; t: float64 [] or [B]; condition: int64 [B] with the null label num_classes, or None for a network
    without classes (or for the null label everywhere). A network with a second time takes `until`, the time that is
    jumped to, float64 [] or [B], default t; one with told_guidance takes guidance, the scale w >= 0, likewise,
    default 1. Others get neither. Returns x_0 in x_t's dtype; the network runs in its own.
    """

    def __init__(self, network: nn.Module, process: Process, prediction: Prediction, num_classes: int | None) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.prediction = prediction
        self.num_classes = num_classes
        self.has_second_time = bool(getattr(network, "has_second_time", False))
        self.told_guidance = bool(getattr(network, "told_guidance", False))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        *,
        until: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        output = self.output(x_t, t, condition, until=until, guidance=guidance)
        return self.prediction.x_0(output, x_t, *scales(self.process, t, like=x_t))

    def output(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        *,
        until: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """What the network itself predicts, in x_t's dtype: F of prediction.py."""
        return self.network(*self._inputs(x_t, t, condition, until, guidance)).to(x_t.dtype)

    def features(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        *,
        until: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The network's inner features, [B, network.num_features] in its dtype."""
        found: Tensor = self.network.features(*self._inputs(x_t, t, condition, until, guidance))  # type: ignore[operator]
        return found

    def _inputs(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None, until: Tensor | None, guidance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dtype = next(self.network.parameters()).dtype
        shown = self.prediction.network_input(x_t, *scales(self.process, t, like=x_t)).to(dtype)
        time = _for_each(self.prediction.network_time(self.process, t), shown)
        inputs = shown, time, self._labels(x_t, condition)
        if not (self.has_second_time or self.told_guidance):
            return inputs
        second = _for_each(second_time(self.process, t if until is None else until), shown)
        scale = torch.ones((), device=x_t.device) if guidance is None else guidance
        return *inputs, second, _for_each(torch.log1p(scale), shown)

    def _labels(self, x_t: Tensor, condition: Tensor | None) -> Tensor | None:
        if self.num_classes is None:
            return None
        if condition is None:
            return torch.full((len(x_t),), self.num_classes, device=x_t.device)
        return condition


def check_answer(x_0: Tensor, x_t: Tensor) -> Tensor:
    """What a denoiser says of x_t. Raises ValueError for what is no x_0: real numbers, in x_t's shape."""
    if not isinstance(x_0, Tensor) or not x_0.is_floating_point():
        kind = str(x_0.dtype).removeprefix("torch.") if isinstance(x_0, Tensor) else type(x_0).__name__
        raise ValueError(f"the denoiser answers {kind}: return x_0 as a tensor of real numbers")
    if x_0.shape != x_t.shape:
        raise ValueError(f"the denoiser answers {list(x_0.shape)} for {list(x_t.shape)}: return x_0 in x_t's shape")
    return x_0


def second_time(process: Process, t: Tensor) -> Tensor:
    """The second time as a network takes it: log(r)/4, r = sigma_t/alpha_t within [1e-3, 1e3].

    Finite at both ends of time, whatever the process and the prediction.
    """
    return torch.log((process.sigma(t) / process.alpha(t)).clamp(1e-3, 1e3)) / 4


def _for_each(values: Tensor, shown: Tensor) -> Tensor:
    """Scalars [] or [B] as [B], where the network's input is, in its dtype and no coarser than float32.

    A network in half precision rounds its features of time, not the time: 999 would become 1000 in bfloat16.
    """
    row = shown.new_empty(len(shown), dtype=torch.promote_types(shown.dtype, torch.float32))
    return expand(values, like=row).expand(len(shown))


class Guided:
    """Classifier-free guidance: mu_w = mu_uncond + w (mu_cond - mu_uncond), w = 1 is the conditional model.

    w: a number, or float64 [B], one for each sample, where the batches are. Both halves go through the network as one
    batch of 2B, and count as two evaluations, also for samples of scale 1: a batch stays whole. Ho & Salimans 2022,
    where the scale is w - 1. A denoiser with told_guidance takes w instead, in one evaluation (Meng et al.
    2023). Raises ValueError for a denoiser without classes.
    """

    nfe_per_call = 2

    def __init__(self, denoiser: nn.Module, scale: float | Tensor) -> None:
        num_classes = getattr(denoiser, "num_classes", None)
        if num_classes is None:
            raise ValueError(f"guidance scale {_format_scale(scale)} needs a class-conditional teacher; leave it at 1")
        self.denoiser = denoiser
        self.null_label = int(num_classes)
        self.scale = scale
        self.takes_guidance = bool(getattr(denoiser, "told_guidance", False))
        self.nfe_per_call = 1 if self.takes_guidance else Guided.nfe_per_call

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            raise ValueError(f"guidance scale {_format_scale(self.scale)} needs class labels; give a condition")
        if self.takes_guidance:
            one = self.scale if isinstance(self.scale, Tensor) else x_t.new_full((), self.scale, dtype=torch.float64)
            return check_answer(self.denoiser(x_t, t, condition, guidance=one), x_t)
        null = torch.full_like(condition, self.null_label)
        times = t if t.ndim == 0 else torch.cat([t, t])
        twice = torch.cat([x_t, x_t])
        uncond, cond = check_answer(self.denoiser(twice, times, torch.cat([null, condition])), twice).chunk(2)
        scale = expand(self.scale, like=x_t) if isinstance(self.scale, Tensor) else self.scale
        return uncond + scale * (cond - uncond)


def _format_scale(scale: float | Tensor) -> str:
    return "of each sample" if isinstance(scale, Tensor) else str(scale)


def null_labelled(stored: Tensor, num_classes: int | None) -> Tensor | None:
    """Stored labels [B] as a network takes them: -1 becomes its null label; None for a network without classes."""
    return None if num_classes is None else torch.where(stored < 0, num_classes, stored)
