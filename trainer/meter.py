"""The figures of a run's steps between two lines of its log."""

import time

import torch

from trainer.stream import Stream

Figures = dict[str, float | int | str]


class Meter:
    """Means since the last line: loss, norm of the gradient, samples a second, share of time spent waiting for data.

    The first batch of a stream, which is there when reading has begun, is a figure of its own and no part of the rest.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream, self._has_begun, self._first_told = stream, False, False
        self._reset()

    def note_batch(self) -> None:
        """A batch is there: time counts from the first on."""
        if not self._has_begun:
            self._reset()
        self._has_begun = True

    def add(self, loss: torch.Tensor, norm: torch.Tensor, samples: int) -> None:
        """One step's figures, left on the device so that the step need not wait for them."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._samples += samples

    def finite(self, *, norms: bool) -> bool:
        """Whether every loss since the last line is, and every norm."""
        figures = self._losses + (self._norms if norms else [])
        return not figures or bool(torch.stack(figures).isfinite().all())

    def take(self) -> Figures:
        """The figures, and start again."""
        loss, norm = torch.stack(self._losses).mean().item(), torch.stack(self._norms).mean().item()
        seconds = time.perf_counter() - self._started
        figures: Figures = {
            "loss": loss,
            "grad_norm": norm,
            "samples_per_s": self._samples / seconds,
            "data_wait": (self._stream.waited - self._waited) / seconds,
            "epoch": self._stream.epochs,
        }
        if not self._first_told:
            figures["first_batch_s"] = self._stream.first_wait or 0.0
        self._first_told = True
        self._reset()
        return figures

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._samples, self._started, self._waited = 0, time.perf_counter(), self._stream.waited
