"""Which frame a solve is in, where its points lie, and that Euler is the same step in both."""

import pytest
import torch

from limbeck.diffusion.frames import frame_for, points_at, points_between
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.grids import uniform_time
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from limbeck.diffusion.solvers import SOLVERS

PROCESSES = [LinearVP(), CosineVP(), VE(), RectifiedFlow(), DiscreteVP((0.01, 0.1, 0.5, 0.9))]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def times_at(process, *ratios):
    return process.time_at(torch.tensor(ratios, dtype=torch.float64))


def test_the_frame_follows_alpha_at_the_start():
    assert [frame_for(process, uniform_time(process, 4)) for process in PROCESSES] == [
        "sigma", "flow", "sigma", "flow", "sigma",
    ]  # fmt: skip
    assert frame_for(CosineVP(), torch.tensor([0.9, 0.1], dtype=torch.float64)) == "sigma"


@pytest.mark.parametrize("frame", ["sigma", "flow"])
@every_process
def test_points_between_two_points_divide_the_way(process, frame):
    here, there = points_at(process, times_at(process, 3.0, 0.2), frame=frame)
    at = points_between(process, here, there, [0.5, 0.75, 1, 0], frame=frame)
    assert at[2] is there
    assert at[3] is here
    for point, part in zip(at, (0.5, 0.75, 1, 0), strict=True):
        expected = here.position + part * (there.position - here.position)
        assert point.position == pytest.approx(expected, rel=1e-13)


def test_euler_is_the_same_in_both_frames():
    process = CosineVP()
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    teacher = GaussianTeacher(process, mean=0.5, variance=0.5)
    times = times_at(process, 3.0, 0.2)
    results = []
    for frame in ("sigma", "flow"):
        (step,) = SOLVERS["ddim"].plan(process, points_at(process, times, frame=frame), frame)
        slope = step[0].on_state * x + step[0].on_x0 * teacher(x, times[0])
        results.append(step[0].carry * x + step[0].weights[0] * slope)
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)
