"""Grids by their formulas, their ends, and the nested subsets that progressive rounds use."""

import math

import pytest
import torch

from limbeck.diffusion.grids import karras, make_grid, subset_indices, uniform_logsnr, uniform_time
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow

PROCESSES = [
    LinearVP(),
    CosineVP(),
    VE(),
    RectifiedFlow(),
    DiscreteVP(tuple(torch.linspace(1e-4, 0.02, 1000).tolist())),
]
NAMES = ["karras", "uniform_time", "uniform_logsnr"]


def ratios(process, times):
    return process.sigma(times) / process.alpha(times)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 18, 64])
def test_every_grid_descends_from_exactly_T_to_exactly_0(name, process, num_steps):
    times = make_grid(name, process, num_steps)
    assert times.dtype == torch.float64
    assert times.shape == (num_steps + 1,)
    assert times[0] == process.T
    assert times[-1] == 0
    assert (times[1:] < times[:-1]).all()


def test_karras_is_the_papers_formula():
    times = karras(VE(), 18)
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert times[i].item() == pytest.approx(expected, rel=1e-13)


def test_karras_starts_at_a_given_ratio_and_ends_at_another():
    process = LinearVP()
    times = karras(process, 8, rho=3, r_max=20.0, r_min=0.01)
    torch.testing.assert_close(ratios(process, times)[[0, 7]], torch.tensor([20.0, 0.01], dtype=torch.float64))


def test_a_ratio_at_T_is_T_itself():
    process = DiscreteVP((0.1, 0.3, 0.5))
    T = torch.tensor(process.T, dtype=torch.float64)
    assert karras(process, 4, r_max=ratios(process, T).item())[0] <= process.T


@pytest.mark.parametrize("process", [CosineVP(), RectifiedFlow()])
@pytest.mark.parametrize("grid", [karras, uniform_logsnr])
def test_an_infinite_ratio_takes_the_place_of_80(process, grid):
    from_T, from_80 = grid(process, 12), grid(process, 12, r_max=80.0)
    assert from_T[0] == process.T
    assert from_80[0] < process.T
    assert torch.equal(from_T[1:], from_80[1:])
    assert ratios(process, from_80)[0].item() == pytest.approx(80.0, rel=1e-12)


def test_logsnr_is_uniform():
    process = CosineVP()
    steps = ratios(process, uniform_logsnr(process, 9, r_max=50.0, r_min=0.02))[:-1].log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, (math.log(0.02) - math.log(50.0)) / 8), rtol=1e-11, atol=0)


def test_time_is_uniform():
    assert torch.equal(uniform_time(RectifiedFlow(), 4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    expected = torch.tensor([1, 0.7, 0.4, 0.1, 0], dtype=torch.float64)
    torch.testing.assert_close(uniform_time(RectifiedFlow(), 4, t_min=0.1), expected, rtol=1e-15, atol=0)


def test_options_reach_the_grid_that_has_them():
    process = VE()
    assert torch.equal(
        make_grid("karras", process, 6, rho=5.0, r_min=0.1), karras(process, 6, rho=5.0, r_max=None, r_min=0.1)
    )
    assert torch.equal(make_grid("uniform_logsnr", process, 6, r_max=9.0), uniform_logsnr(process, 6, r_max=9.0))
    assert torch.equal(make_grid("uniform_time", process, 6, t_min=0.5), uniform_time(process, 6, t_min=0.5))


def test_nested_subsets():
    assert subset_indices(16, 4) == (0, 4, 8, 12, 16)
    assert subset_indices(6, 6) == (0, 1, 2, 3, 4, 5, 6)
    assert subset_indices(18, 1) == (0, 18)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras(VE(), 0), "0 steps: give at least 1"),
        (lambda: karras(VE(), 4, rho=0), "rho 0"),
        (lambda: karras(VE(), 4, r_max=81.0), "r_max 81.0.*<= 80.0"),
        (lambda: karras(VE(), 4, r_min=90.0), "r_min 90.0"),
        (lambda: uniform_logsnr(CosineVP(), 4, r_max=math.inf), "r_max inf"),
        (lambda: uniform_logsnr(CosineVP(), 4, r_min=0.0), "r_min 0.0"),
        (lambda: uniform_time(VE(), 4, t_min=80.0), "t_min 80.0"),
        (lambda: make_grid("cosine", VE(), 4), "grid 'cosine' does not exist: choose one of karras"),
        (lambda: make_grid("uniform_time", VE(), 4, rho=7.0), "uniform_time grid has no rho"),
        (lambda: make_grid("karras", VE(), 4, t_min=1.0), "karras grid has no t_min"),
        (lambda: subset_indices(16, 3), "3 steps are no nested subset of 16"),
        (lambda: subset_indices(16, 0), "0 steps are no nested subset"),
    ],
)
def test_mistakes_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


TABLE = DiscreteVP(tuple(torch.linspace(1e-4, 0.02, 1000).tolist()))


@pytest.mark.parametrize("num_steps", [1, 4, 7, 50, 1000])
@pytest.mark.parametrize(
    ("grid", "scheduler", "spacing", "options"),
    [
        ("trailing", "DDIM", "trailing", {}),
        ("leading", "DDIM", "leading", {}),
        ("linspace", "DDIM", "linspace", {}),
        ("trailing", "DPMSolverMultistep", "trailing", {}),
        ("leading", "DPMSolverMultistep", "leading", {"spare": 1}),
        ("linspace", "DPMSolverMultistep", "linspace", {"spare": 1}),
    ],
)
def test_whole_timesteps_are_diffusers_own(grid, scheduler, spacing, options, num_steps):
    """Their timestep n is our time n + 1."""
    if (num_steps, bool(options)) in ((1000, True), (1, False)) and grid != "trailing":
        pytest.skip("more points than timesteps, or one that is the table's first time")
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, f"{scheduler}Scheduler")(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    times = make_grid(grid, TABLE, num_steps, **options)
    assert times.tolist() == [n + 1 for n in theirs.timesteps.tolist()] + [0]


def test_a_grid_of_a_table_ends_at_its_first_time_where_it_is_told_to():
    assert make_grid("leading", TABLE, 4, offset=1, end=1).tolist() == [752, 502, 252, 2, 1]
    assert make_grid("trailing", TABLE, 2, end=1).tolist() == [1000, 500, 1]


def test_shift_is_sd3s_formula():
    """t becomes s t/(1 + (s - 1) t); 1 shifts nothing, and both ends stay."""
    plain, shifted = uniform_time(RectifiedFlow(), 8), uniform_time(RectifiedFlow(), 8, shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert shifted[[0, -1]].tolist() == [1, 0]
    assert torch.equal(uniform_time(RectifiedFlow(), 8, shift=1.0), plain)


def test_times_are_taken_as_they_are_given():
    assert make_grid("times", VE(), 3, times=(80.0, 3.0, 0.5, 0.0)).tolist() == [80, 3, 0.5, 0]


@pytest.mark.parametrize(
    ("name", "process", "steps", "options", "message"),
    [
        ("trailing", VE(), 4, {}, "only a table of betas has"),
        ("leading", TABLE, 1001, {}, "1001 steps on a table of 1000 timesteps: give at most 1000"),
        ("leading", TABLE, 1000, {"spare": 1}, "1000 steps on a table of 1000 timesteps: give at most 999"),
        ("leading", TABLE, 1, {}, "1 step of the leading grid begins at the table's first time"),
        ("linspace", TABLE, 1, {}, "1 step of the linspace grid begins at the table's first time"),
        ("leading", TABLE, 4, {"offset": 250}, "offset 250: give one from 0 to 249"),
        ("leading", TABLE, 4, {"end": 1}, "end 1: the grid has 1 as its last time before"),
        ("trailing", TABLE, 4, {"end": 2}, "end 2: give 0"),
        ("linspace", TABLE, 4, {"spare": 2}, "spare 2: give 0, or 1"),
        ("uniform_time", VE(), 4, {"shift": 0.0}, "shift 0.0: give one above 0"),
        ("times", VE(), 3, {"times": (80.0, 0.0)}, "times has 2 points, 3 steps need 4"),
        ("times", VE(), 1, {"times": (90.0, 0.0)}, "from 80.0 at most to 0"),
        ("times", VE(), 2, {"times": (80.0, 80.0, 0.0)}, "give them descending"),
        ("karras", VE(), 4, {"shift": 2.0}, "the karras grid has no shift"),
    ],
)
def test_what_a_grid_can_not_be_is_refused_in_one_line(name, process, steps, options, message):
    with pytest.raises(ValueError, match=message) as told:
        make_grid(name, process, steps, **options)
    assert "\n" not in str(told.value)
