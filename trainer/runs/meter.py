"""The figures of a run's steps between two lines of its log."""

import resource
import sys
import time
from collections.abc import Mapping

import torch

from limbeck.trainer.stream import Stream

Figures = dict[str, float | int | str]


class Meter:
    """Means since the last line: losses, norms of gradients, samples a second, share of time spent waiting for data.

    The first batch of a stream, which is there when reading has begun, is a figure of its own and no part of the rest.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream, self._device, self._has_begun, self._first_reported = stream, device, False, False
        self._reset()

    def note_batch(self) -> None:
        """Note a batch: time counts from the first on."""
        if not self._has_begun:
            self._reset()
        self._has_begun = True

    def add(self, found: Mapping[str, torch.Tensor], samples: int) -> None:
        """One step's figures, left on the device so that the step need not wait for them."""
        for name, figure in found.items():
            self._found.setdefault(name, []).append(figure)
        self._samples += samples

    def finite(self, *, norms: bool) -> bool:
        """Whether every loss since the last line is finite; with `norms` every norm, too."""
        looked_at = [figures for name, figures in self._found.items() if norms or not name.endswith("norm")]
        return all(bool(torch.stack(figures).isfinite().all()) for figures in looked_at)

    def take(self) -> Figures:
        """The figures since the last line; then start again."""
        means = {name: torch.stack(figures).mean().item() for name, figures in self._found.items()}
        seconds = time.perf_counter() - self._started
        figures: Figures = {
            **means,
            "samples_per_s": self._samples / seconds,
            "data_wait": (self._stream.waited - self._waited) / seconds,
            "epoch": self._stream.epochs,
            "memory_mib": peak_memory(self._device) / 2**20,
        }
        if not self._first_reported:
            figures["first_batch_s"] = self._stream.first_wait or 0.0
        self._first_reported = True
        self._reset()
        return figures

    def _reset(self) -> None:
        self._found: dict[str, list[torch.Tensor]] = {}
        self._samples, self._started, self._waited = 0, time.perf_counter(), self._stream.waited


def peak_memory(device: torch.device) -> int:
    """Peak bytes of tensors on the GPU, or on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
