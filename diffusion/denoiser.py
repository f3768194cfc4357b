"""A network as a denoiser: (x_t, t, condition) -> x_0."""

import torch
from torch import Tensor, nn

from diffusion.prediction import Prediction
from diffusion.process import Process, expand, scales


class Denoiser(nn.Module):
    """mu(x_t, t): the x_0 that a network's prediction says, for 0 < sigma_t.

    x_t: [B, ...]; t: float64 [] or [B]; condition: int64 [B] with the null label num_classes, or None for a network
    without classes (or for the null label everywhere). Returns x_0 in x_t's dtype; the network runs in its own.
    """

    def __init__(self, network: nn.Module, process: Process, prediction: Prediction, num_classes: int | None) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.prediction = prediction
        self.num_classes = num_classes

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.prediction.x_0(self.output(x_t, t, condition), x_t, *scales(self.process, t, like=x_t))

    def output(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the network itself predicts, in x_t's dtype: F of prediction.py."""
        dtype = next(self.network.parameters()).dtype
        shown = self.prediction.network_input(x_t, *scales(self.process, t, like=x_t))
        time = expand(self.prediction.network_time(self.process, t), like=x_t.new_empty(len(x_t), dtype=dtype))
        return self.network(shown.to(dtype), time.expand(len(x_t)), self._labels(x_t, condition)).to(x_t.dtype)

    def _labels(self, x_t: Tensor, condition: Tensor | None) -> Tensor | None:
        if self.num_classes is None:
            return None
        if condition is None:
            return torch.full((len(x_t),), self.num_classes, device=x_t.device)
        return condition


class Guided:
    """Classifier-free guidance: mu_w = mu_uncond + w (mu_cond - mu_uncond), w = 1 is the conditional model.

    Both halves go through the network as one batch of 2B, and count as two evaluations. Ho & Salimans 2022, where the
    scale is w - 1. Raises ValueError for a denoiser without classes.
    """

    nfe_per_call = 2

    def __init__(self, denoiser: nn.Module, scale: float) -> None:
        num_classes = getattr(denoiser, "num_classes", None)
        if num_classes is None:
            raise ValueError(f"guidance scale {scale} needs a class-conditional teacher; leave it at 1")
        self.denoiser = denoiser
        self.null_label = int(num_classes)
        self.scale = scale

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            raise ValueError(f"guidance scale {self.scale} needs class labels; give a condition")
        null = torch.full_like(condition, self.null_label)
        times = t if t.ndim == 0 else torch.cat([t, t])
        both = self.denoiser(torch.cat([x_t, x_t]), times, torch.cat([null, condition]))
        uncond, cond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)
