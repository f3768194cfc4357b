"""From a teacher whose flow is known exactly to students that reach the bound which their capacity sets.

The teacher is a product of 1-D mixtures, so x_T -> x_0 is one scalar map, known exactly. The student is affine at
every time: the best error that it can reach is a least-squares residual, an integral over x_T ~ N(0, sigma_T^2) that
the tests evaluate on a fine grid of quantiles. Nothing below is fitted to what the code happens to give.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from limbeck.diffusion.flow_map import FlowMap, jump_coefficients
from limbeck.diffusion.grids import subset_indices
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.solvers import solve
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.store import Store
from limbeck.trainer.networks.student import find_student

STEPS = 8
TRAIN, HOLDOUT = 8192, 8192
DIMENSIONS = 2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A store of closed-form trajectories, as the command line makes it."""
    store = tmp_path_factory.mktemp("closed_form") / "pairs"
    words = (
        f"generate --teacher builtin:mixture --store {store} --count {TRAIN} --holdout {HOLDOUT} --solver.steps {STEPS}"
    )
    words += (
        " --solver.name rk4 --states 2 4 6 --dtype float32 --samples-per-shard 2048 --micro-batch 512 --runner local"
    )
    assert main(COMMANDS, words.split()) == 0
    return store


@pytest.fixture(scope="module")
def population():
    """Every x_T there is, as 100,000 equally likely quantiles: the stored states [K, n] and the exact x_0 [n]."""
    teacher = load_teacher("builtin:mixture")
    n = 100_000
    x_T = torch.from_numpy(80.0 * ndtri((np.arange(n) + 0.5) / n))
    dataset_times = grid_times()
    states = solve(teacher.denoiser, teacher.process, x_T[:, None], dataset_times, solver="rk4").states[..., 0]
    zero = torch.tensor(0.0, dtype=torch.float64)
    return states, teacher.denoiser.flow_map(x_T, dataset_times[0], zero)


def grid_times():
    from limbeck.diffusion.grids import make_grid
    from limbeck.diffusion.process import VE

    return make_grid("karras", VE(), STEPS)


def fit(pairs, out, *words, network=("--network.name", "affine", "--lr", "0.02")):
    words = ["fit", "--data", str(pairs), "--out", str(out), "--init", "scratch", *network, *words]
    assert main(COMMANDS, [*words, "--steps", "700", "--batch-size", "512"]) == 0


def affine_fit(x, y):
    """The least-squares line through equally likely points: its values at x."""
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(unbiased=False)
    return y.mean() + slope * (x - x.mean())


def best_affine_students(states, times, steps):
    """x_0 [n] of the sampler whose mu at every grid time is the least-squares line through that segment's x~."""
    process = load_teacher("builtin:mixture").process
    indices = subset_indices(STEPS, steps)
    x = states[0]
    for here, there in pairwise(indices):
        keep, pull = jump_coefficients(process, times[here], times[there])
        implied = (states[there] - keep * states[here]) / pull
        slope_at = affine_fit(states[here], implied)
        # The line is evaluated at the student's own x, which has left the teacher's trajectory.
        slope = (slope_at[-1] - slope_at[0]) / (states[here][-1] - states[here][0])
        mu = slope_at[0] + slope * (x - states[here][0])
        x = keep * x + pull * mu
    return x


def holdout_errors(pairs, run, steps):
    """(error against the exact flow, its standard error): mean squares over all holdout noises and coordinates."""
    dataset = open_dataset(Store.open(str(pairs)))
    noise = np.concatenate([dataset.read(shard, ["noise"])["noise"] for shard in dataset.shards("holdout")])
    x_T = torch.from_numpy(noise).double()
    student = find_student(run, steps)
    sampled = FlowMap(student.build()).sample(x_T.float(), torch.tensor(student.grids[steps], dtype=torch.float64))
    teacher = load_teacher("builtin:mixture")
    T, zero = (torch.tensor(t, dtype=torch.float64) for t in (teacher.process.T, 0.0))
    square = (sampled.detach().double() - teacher.denoiser.flow_map(x_T, T, zero)).square().flatten()
    return square.mean().item(), (square.std() / len(square) ** 0.5).item()


def assert_reaches(error, standard_error, bound, *, parameters):
    """The population bound, to four standard errors and the excess risk of least squares on TRAIN rows."""
    excess = 2 * bound * parameters / (TRAIN * DIMENSIONS)
    assert abs(error - bound) < 4 * standard_error + excess, (error, bound, standard_error, excess)


def test_a_kd_student_reaches_the_error_of_the_best_line(pairs, population, tmp_path):
    states, exact = population
    fit(pairs, tmp_path / "kd", "--objective.name", "knowledge")
    bound = (affine_fit(states[0], states[-1]) - exact).square().mean().item()
    assert_reaches(*holdout_errors(pairs, tmp_path / "kd", 1), bound, parameters=2 * DIMENSIONS)


@pytest.mark.faults
def test_a_network_goes_where_no_line_can(pairs, population, tmp_path):
    states, exact = population
    network = ("--network.width", "64", "--network.depth", "2", "--lr", "0.003")
    fit(pairs, tmp_path / "kd", "--objective.name", "knowledge", network=network)
    error, standard_error = holdout_errors(pairs, tmp_path / "kd", 1)
    best_line = (affine_fit(states[0], states[-1]) - exact).square().mean().item()
    assert error < best_line / 2 - 4 * standard_error, (error, best_line)


@pytest.mark.faults
def test_progressive_students_reach_the_error_of_their_best_lines(pairs, population, tmp_path):
    states, exact = population
    run = tmp_path / "progressive"
    fit(pairs, run, "--objective.name", "progressive", "--objective.schedule", "4", "2", "1")
    bounds = {}
    for steps in (4, 2, 1):
        bounds[steps] = (best_affine_students(states, grid_times(), steps) - exact).square().mean().item()
        assert_reaches(*holdout_errors(pairs, run, steps), bounds[steps], parameters=2 * DIMENSIONS * steps)
    # Lines composed are a line, so no number of affine steps beats the best single one.
    assert bounds[1] <= min(bounds.values()) + 1e-12
