"""Teachers that misbehave, for `python:strange_teachers:NAME`.

Each is builtin:gaussian until it meets a certain x_T, which it knows by its bits: the first call shows it.
What the environment says changes when they misbehave, never what they answer.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.process import VE

BAD_ID = 70
"""Meets task train-00000001 of 64 samples a shard."""


class Strange(GaussianTeacher):
    sample_shape = (2,)

    def __init__(self, misbehave) -> None:
        super().__init__(VE(), mean=0.5, variance=0.25)
        self.misbehave = misbehave

    def forward(self, x_t, t, condition=None):
        x_0 = super().forward(x_t, t, condition)
        bad = (x_t == x_T_of(BAD_ID)).all(1) if t == self.process.T else torch.zeros(len(x_t), dtype=torch.bool)
        return self.misbehave(x_0, bad)


def x_T_of(sample_id):
    eps = noise.standard_normal(0, "train", [sample_id], (2,))
    return torch.from_numpy((80.0 * eps).astype(np.float16)).float()


def says(value):
    return lambda x_0, bad: torch.where(bad[:, None], torch.tensor(value, dtype=x_0.dtype), x_0)


def odd_teacher():
    """Its time of pure noise has more digits than a recipe."""
    teacher = GaussianTeacher(VE(200 / 3), mean=0.5, variance=0.25)
    teacher.sample_shape = (2,)
    return teacher


def nan_teacher():
    return Strange(says(float("nan")))


def overflowing_teacher():
    """Finite in float32, past float16."""
    return Strange(says(1e6))


def raising_teacher():
    def misbehave(x_0, bad):
        if bad.any():
            raise ArithmeticError("this teacher can't see sample 70")
        return x_0

    return Strange(misbehave)


def recovering_teacher():
    """Raises at the bad sample the first time that any process meets it."""

    def misbehave(x_0, bad):
        if bad.any() and first_time():
            raise ArithmeticError("not today")
        return x_0

    return Strange(misbehave)


def killed_teacher():
    """Its process is killed at the bad sample the first time that any process meets it."""

    def misbehave(x_0, bad):
        if bad.any() and first_time():
            os.kill(os.getpid(), signal.SIGKILL)
        return x_0

    return Strange(misbehave)


def deadly_teacher():
    """Its process is killed at the bad sample every time."""

    def misbehave(x_0, bad):
        if bad.any():
            os.kill(os.getpid(), signal.SIGKILL)
        return x_0

    return Strange(misbehave)


def hanging_teacher():
    """Hangs at the bad sample the first time that any process meets it."""

    def misbehave(x_0, bad):
        if bad.any() and first_time():
            time.sleep(600)
        return x_0

    return Strange(misbehave)


def crashing_teacher():
    """Native code of its process crashes at the bad sample every time."""

    def misbehave(x_0, bad):
        if bad.any():
            ctypes.string_at(0)
        return x_0

    return Strange(misbehave)


def filling_teacher():
    """Another program fills the scratch folder while the bad sample is solved, where the environment wants that."""

    def misbehave(x_0, bad):
        if bad.any() and "STRANGE_FILLS" in os.environ:
            with suppress(OSError), open(Path(tempfile.gettempdir()) / "of another", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        return x_0

    return Strange(misbehave)


def slow_teacher():
    def misbehave(x_0, bad):
        time.sleep(float(os.environ.get("STRANGE_DELAY", "0")))
        return x_0

    return Strange(misbehave)


def broken_teacher():
    raise RuntimeError("no such accelerator")


def sabotaged_teacher():
    """A sound teacher in a process that is struck at the step of the protocol that the environment names."""
    from sabotage import sabotage

    sabotage()
    return Strange(lambda x_0, bad: x_0)


def picky_teacher():
    """Loads in the process that planned, and nowhere else."""
    if os.environ.get("STRANGE_PLANNER") != str(os.getpid()):
        raise RuntimeError("no such accelerator")
    return Strange(lambda x_0, bad: x_0)


def first_time():
    try:
        Path(os.environ["STRANGE_MARKER"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def counted_teacher():
    """slow_teacher, which leaves a file with its process's id in the folder of the marker."""
    Path(os.environ["STRANGE_MARKER"]).parent.joinpath(f"pid-{os.getpid()}").touch()
    return slow_teacher()


class Flaky(GaussianTeacher):
    """Not finite at the train ids that the environment names."""

    sample_shape = (2,)

    def __init__(self):
        super().__init__(VE(), mean=0.5, variance=0.25)

    def forward(self, x_t, t, condition=None):
        x_0 = super().forward(x_t, t, condition)
        for sample_id in map(int, os.environ.get("STRANGE_NAN", "").split() if t == self.process.T else ()):
            x_0[(x_t == x_T_of(sample_id)).all(1)] = float("nan")
        return x_0


def sick_teacher():
    """NaN wherever the first process that solves calls it, but for the one that planned: as by a broken GPU."""

    def misbehave(x_0, bad):
        return x_0 * float("nan") if is_sick_process() else x_0

    return Strange(misbehave)


def is_sick_process():
    marker, me = Path(os.environ["STRANGE_MARKER"]), str(os.getpid())
    if os.environ.get("STRANGE_PLANNER") == me:
        return False
    try:
        with marker.open("x") as file:
            file.write(me)
        return True
    except FileExistsError:
        return marker.read_text() == me


def exiting_teacher():
    """Ends its program, with code 0, at the bad sample."""

    def misbehave(x_0, bad):
        if bad.any():
            sys.exit(0)
        return x_0

    return Strange(misbehave)


def exit_at_once():
    sys.exit(0)


def exiting_at_the_first_call():
    return Strange(lambda x_0, bad: sys.exit())


def nan_weights():
    return Strange(lambda x_0, bad: x_0 * float("nan"))


def integers():
    return Strange(lambda x_0, bad: x_0.round().long())


def complex_numbers():
    return Strange(lambda x_0, bad: x_0 + 0j)


def no_tensor():
    return Strange(lambda x_0, bad: x_0.tolist())


def more_channels():
    return Strange(lambda x_0, bad: torch.cat([x_0, x_0], 1))


class Changing(GaussianTeacher):
    """Scales its input where it lies, as a preconditioning that saves memory would."""

    sample_shape = (2,)

    def __init__(self):
        super().__init__(VE(), mean=0.5, variance=0.25)

    def forward(self, x_t, t, condition=None):
        x_0 = super().forward(x_t, t, condition)
        x_t.mul_(0.5)
        return x_0
