"""Teachers with a known appetite for memory or time, for `python:hungry_teachers:NAME`.

Each answers as builtin:gaussian does. What the environment says changes when they fail, never what they answer.
"""

import os
import signal
import time
from pathlib import Path

import torch

from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.process import VE
from limbeck.pipeline.job.prepare import TRIED


class Hungry(GaussianTeacher):
    """Notes the size of every batch that it is shown, then has its way with it; but for what a driver's trial asks."""

    sample_shape = (2,)

    def __init__(self, feed) -> None:
        super().__init__(VE(), mean=0.5, variance=0.25)
        self.feed = feed
        self.begins = True

    def forward(self, x_t, t, condition=None):
        begins, self.begins = self.begins, False
        if begins and len(x_t) == TRIED:
            return super().forward(x_t, t, condition)
        if "HUNGRY_DIARY" in os.environ:
            with Path(os.environ["HUNGRY_DIARY"]).open("a") as diary:
                diary.write(f"{len(x_t)}\n")
        self.feed(x_t)
        return super().forward(x_t, t, condition)


def too_many(x_t):
    return len(x_t) > int(os.environ.get("HUNGRY_ROOM", "1000000"))


def gpu_teacher():
    """Has room for HUNGRY_ROOM samples, and says what a GPU's allocator says."""

    def feed(x_t):
        if too_many(x_t):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB.")

    return Hungry(feed)


def cpu_teacher():
    """Asks torch's CPU allocator for more than any machine has."""

    def feed(x_t):
        if too_many(x_t):
            torch.empty(2**60, dtype=torch.uint8)

    return Hungry(feed)


def doomed_teacher():
    """Is killed, as by the kernel's out-of-memory killer, which leaves no chance to say anything."""

    def feed(x_t):
        if too_many(x_t):
            os.kill(os.getpid(), signal.SIGKILL)

    return Hungry(feed)


def sleepy_teacher():
    """HUNGRY_SECONDS a call."""
    return Hungry(lambda x_t: time.sleep(float(os.environ["HUNGRY_SECONDS"])))


def wrong_teacher():
    """Fails for a reason that smaller batches don't mend."""

    def feed(x_t):
        raise RuntimeError("expected scalar type Float but found Half")

    return Hungry(feed)


class Convolution(torch.nn.Module):
    """A small convolutional denoiser of images 3x8x8 that notes in which memory format it is shown them."""

    process = VE()
    sample_shape = (3, 8, 8)
    num_classes = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.nn.init.normal_(self.layer.weight, std=0.1)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen = set()

    def forward(self, x_t, t, condition=None):
        self.seen.add(x_t.is_contiguous(memory_format=torch.channels_last))
        return self.layer(x_t / (1 + t.to(x_t.dtype)))


def convolution_teacher():
    return Convolution()
