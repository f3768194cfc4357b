"""Every solver shows its declared order against exact flows; the two ends, the counts and the mistakes apart."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from limbeck.diffusion.frames import points_at
from limbeck.diffusion.gaussian import GaussianTeacher, MixtureTeacher
from limbeck.diffusion.grids import karras, uniform_time
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow, scales
from limbeck.diffusion.solvers import SOLVERS, plan, solve

TABLE = tuple(torch.linspace(1e-3, 0.2, 50, dtype=torch.float64).tolist())
PROCESSES = [LinearVP(), CosineVP(), VE(), RectifiedFlow(), DiscreteVP(TABLE)]
FROM_PURE_NOISE = [CosineVP(), RectifiedFlow(), DiscreteVP((*TABLE[:-1], 1.0))]
FAR, NEAR = 3.0, 0.2  # ends of the measured interval, in sigma/alpha

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
from_pure_noise = pytest.mark.parametrize("process", FROM_PURE_NOISE, ids=["cosine", "flow", "zero_terminal"])
both_teachers = pytest.mark.parametrize("kind", ["gaussian", "mixture"])


def make_teacher(kind, process):
    if kind == "gaussian":
        return GaussianTeacher(process, mean=0.5, variance=0.5)
    return MixtureTeacher(process, weights=(0.3, 0.7), means=(-0.6, 0.8), variances=(0.3, 0.2))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_of(process, times, shape=(32, 2)):
    """States as the teachers' marginals have them at times[0], near enough."""
    x = noise(*shape)
    alpha, sigma = scales(process, times[0], like=x)
    return 0.4 * alpha + torch.sqrt(sigma**2 + alpha**2 / 2) * x


def smooth(u):
    """Log-SNR with steps that grow smoothly along the interval."""
    return u + u * (1 - u) / 5


def grid(process, u, *, warp=smooth):
    """Times at the parts u of the way, in warped log-SNR, from FAR down to NEAR."""
    return process.time_at(torch.exp(math.log(FAR) + (math.log(NEAR) - math.log(FAR)) * warp(u)))


def uniform(n):
    return torch.linspace(0, 1, n + 1, dtype=torch.float64)


def alternating(n):
    """Steps of lengths 2, 1, 2, 1, ...: a multistep rule for equal steps would show an order less."""
    u = uniform(n)
    u[1::2] += 1 / (3 * n)
    return u


def short_start(u):
    """Two first steps of about h^2, so short that their lower orders do not show."""
    h = u[1].item() ** 2
    return torch.cat([u[:1], u[:1] + h, u[:1] + 2 * h, u[1:]])


def error(teacher, times, solver):
    x = start_of(teacher.process, times)
    end = solve(teacher, teacher.process, x, times, solver=solver, keep=[len(times) - 1]).states[0]
    return (end - teacher.flow_map(x, times[0], times[-1])).square().mean().sqrt().item()


def order(error_at, n):
    return math.log2(error_at(n) / error_at(2 * n))


# Steps from which on the error's next term is too small to show in the order.
FINE = {"rk4": 16, "ab2": 128, "deis": 128, "dpmpp_2m": 256, "dpmpp_3m": 128, "unipc": 128}


@every_solver
@every_process
@both_teachers
def test_order(solver, process, kind):
    teacher, declared = make_teacher(kind, process), SOLVERS[solver].order

    def error_at(n):
        u = short_start(uniform(n)) if solver == "dpmpp_3m" else uniform(n)
        return error(teacher, grid(process, u), solver)

    assert order(error_at, FINE.get(solver, 64)) == pytest.approx(declared, abs=0.15)


@every_process
@both_teachers
def test_3m_shows_order_2_from_its_own_start(process, kind):
    """Its one Euler step leaves an error of h^2, which no later step mends."""
    teacher = make_teacher(kind, process)
    assert order(lambda n: error(teacher, grid(process, uniform(n)), "dpmpp_3m"), 128) > 1.85


@pytest.mark.parametrize("solver", ["ab2", "deis", "dpmpp_2m", "dpmpp_3m", "unipc"])
@both_teachers
def test_multistep_orders_hold_where_step_lengths_alternate(solver, kind):
    process = VE()
    teacher = make_teacher(kind, process)

    def error_at(n):
        u = short_start(alternating(n)) if solver == "dpmpp_3m" else alternating(n)
        return error(teacher, grid(process, u), solver)

    assert order(error_at, FINE.get(solver, 64)) == pytest.approx(SOLVERS[solver].order, abs=0.15)


@pytest.mark.parametrize("solver", ["ddim", "heun", "rk4", "ab2"])
@from_pure_noise
@both_teachers
def test_slope_solvers_keep_their_order_from_alpha_0(solver, process, kind):
    """The flow frame is regular there: nothing is lost."""
    teacher = make_teacher(kind, process)

    def error_at(n):
        tau = 1 - 0.7 * uniform(n)
        return error(teacher, process.time_at(tau / (1 - tau)), solver)

    assert order(error_at, FINE.get(solver, 64)) == pytest.approx(SOLVERS[solver].order, abs=0.15)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m"])
@from_pure_noise
@both_teachers
def test_dpmpp_from_alpha_0_loses_no_more_than_a_logarithm(solver, process, kind):
    """Steps uniform in tau next to alpha = 0 lie log((k+1)/k) apart in lambda, however fine.

    Holding x_0 over the k-th such step errs by h/k, which the step weighs by alpha (1 - e^-h) = h: the sum over k is
    h^2 log(1/h).
    """
    teacher = make_teacher(kind, process)

    def error_at(n):
        tau = 1 - 0.7 * uniform(n)
        return error(teacher, process.time_at(tau / (1 - tau)), solver)

    n = 128
    assert order(error_at, n) > 2 + math.log2(math.log(n) / math.log(2 * n)) - 0.02


@pytest.mark.parametrize("solver", ["ddim", "ab2", "dpmpp_2m", "dpmpp_3m"])
@from_pure_noise
def test_the_first_step_from_alpha_0_is_ddims(solver, process):
    teacher, x_T = make_teacher("mixture", process), noise(4, 3)
    times = uniform_time(process, 10)
    alpha, sigma = scales(process, times[1], like=x_T)
    expected = alpha * teacher(x_T, times[0]) + sigma * x_T
    first = solve(teacher, process, x_T, times, solver=solver, keep=[1]).states[0]
    torch.testing.assert_close(first, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "rk4"])
@every_process
def test_a_last_step_to_sigma_0_is_the_denoiser(solver, process):
    teacher = make_teacher("mixture", process)
    times = grid(process, uniform(3))
    times = torch.cat([times[:1], times.new_zeros(1)]) if solver == "ab2" else torch.cat([times, times.new_zeros(1)])
    states = solve(teacher, process, start_of(process, times), times, solver=solver).states
    torch.testing.assert_close(states[-1], teacher(states[-2], times[-2]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("solver", "rate"), [("ddim", 2), ("heun", 2), ("ab2", 2), ("dpmpp_2m", 2), ("rk4", 4)])
@every_process
@both_teachers
def test_a_last_step_to_sigma_0_errs_by_its_local_order(solver, rate, process, kind):
    """Local order p + 1: Euler's 2, and 4 for the three inner stages that end rk4."""
    teacher, T = make_teacher(kind, process), torch.tensor(process.T, dtype=torch.float64)

    def error_from(ratio):
        times = process.time_at(torch.tensor([ratio, 0], dtype=torch.float64))
        x = teacher.flow_map(noise(32, 2) * scales(process, T, like=T)[1], T, times[0])
        end = solve(teacher, process, x, times, solver=solver).states[-1]
        return (end - teacher.flow_map(x, times[0], times[-1])).square().mean().sqrt().item()

    assert math.log2(error_from(0.05) / error_from(0.025)) == pytest.approx(rate, abs=0.15)


@every_process
def test_eulers_last_step_errs_by_what_the_gaussian_says(process):
    """y - m scales by v/(v + r^2) where the flow scales it by the square root of that."""
    teacher = make_teacher("gaussian", process)
    times = process.time_at(torch.tensor([0.3, 0], dtype=torch.float64))
    x = start_of(process, times)
    shrink = 0.5 / (0.5 + 0.3**2)
    deviation = x / process.alpha(times[0]) - 0.5
    error_at_end = solve(teacher, process, x, times, solver="heun").states[-1] - teacher.flow_map(x, times[0], times[1])
    torch.testing.assert_close(error_at_end, (shrink - math.sqrt(shrink)) * deviation, rtol=1e-11, atol=1e-13)


def test_3m_integrates_a_parabola_in_log_snr_exactly():
    """x_s/alpha_s - e^-h x_t/alpha_t = integral of exp(lambda - lambda_s) x_0(lambda), by quadrature."""
    process = CosineVP()
    times = grid(process, torch.tensor([0, 0.2, 0.3, 0.6], dtype=torch.float64))
    points = points_at(process, times, frame="sigma")
    lambdas = [point.log_snr for point in points]
    call = plan("dpmpp_3m", process, times)[2][0]
    for power in range(3):
        expected, _ = integrate.quad(
            lambda at, power=power: math.exp(at - lambdas[3]) * at**power, lambdas[2], lambdas[3], epsabs=1e-14
        )
        found = np.dot(call.weights, [lambdas[n] ** power for n in (2, 1, 0)]) / points[3].alpha
        assert found == pytest.approx(expected, rel=1e-11)


class Watched:
    """A teacher that writes down how it is called, and answers into one buffer, as a captured graph does."""

    def __init__(self, teacher):
        self.teacher, self.times, self.conditions, self.buffer = teacher, [], [], None

    def __call__(self, x_t, t, condition):
        self.times.append(t)
        self.conditions.append(condition)
        self.buffer = torch.empty_like(x_t) if self.buffer is None else self.buffer
        return self.buffer.copy_(self.teacher(x_t, t, condition))


CALLS = {
    "ddim": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "rk4": lambda n: 4 * (n - 1) + 3,
    "ab2": lambda n: n,
    "deis": lambda n: n,
    "unipc": lambda n: n,
    "dpmpp_2m": lambda n: n,
    "dpmpp_3m": lambda n: n,
}


@every_solver
@every_process
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_calls_are_counted_and_none_is_at_sigma_0(solver, process, num_steps):
    watched = Watched(make_teacher("mixture", process))
    label, x_T, times = torch.tensor([3, 1]), noise(2, 3), karras(process, num_steps)
    solution = solve(watched, process, x_T, times, solver=solver, condition=label)
    assert solution.nfe == len(watched.times) == CALLS[solver](num_steps)
    assert all(t.dtype == torch.float64 and t.ndim == 0 and process.sigma(t) > 0 for t in watched.times)
    assert all(condition is label for condition in watched.conditions)
    assert torch.isfinite(solution.states).all()
    fresh = solve(watched.teacher, process, x_T, times, solver=solver, condition=label)
    assert torch.equal(solution.states, fresh.states)


def test_an_interval_that_stops_before_0_costs_heun_both_calls_of_every_step():
    process = VE()
    assert solve(make_teacher("gaussian", process), process, noise(2, 2), grid(process, uniform(5))).nfe == 10


def test_a_guided_call_counts_what_it_costs():
    process = VE()
    teacher = make_teacher("gaussian", process)
    teacher.nfe_per_call = 2
    assert solve(teacher, process, noise(2, 2), karras(process, 4), solver="heun").nfe == 14


@every_solver
@every_process
def test_states_dtypes_and_keeping(solver, process):
    teacher, times = make_teacher("mixture", process), karras(process, 8)
    x_T = noise(5, 3) * process.sigma(times[0])
    before = x_T.clone()
    everything = solve(teacher, process, x_T, times, solver=solver)
    assert torch.equal(x_T, before)
    assert torch.equal(everything.states[0], before)
    assert everything.states.shape == (9, 5, 3)
    assert torch.equal(everything.times, times)
    kept = solve(teacher, process, x_T, times, solver=solver, keep=(0, 3, 8))
    assert torch.equal(kept.states, everything.states[[0, 3, 8]])
    assert torch.equal(kept.times, times[[0, 3, 8]])
    alone = solve(teacher, process, x_T[2:3], times, solver=solver)
    assert torch.equal(alone.states, everything.states[:, 2:3])

    single = solve(teacher, process, x_T.float(), times, solver=solver)
    assert single.states.dtype == torch.float32
    # A few roundings a step at the state's own size, none of which the flow towards data makes larger.
    size = everything.states.abs().amax(dim=(1, 2), keepdim=True)
    assert ((single.states.double() - everything.states) / size.clamp(min=1)).abs().max() < 8 * 20 * 2**-24


def descending(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "euler"}, "solver 'euler' does not exist: choose one of ddim, heun"),
        ({"times": descending(1, 0.5, 0.5, 0)}, "do not descend"),
        ({"times": descending(0, 0.5, 1)}, "do not descend"),
        ({"times": descending(1, math.nan, 0)}, "do not descend"),
        ({"times": descending(1.5, 0)}, "from 1.5 to 0.0: give times between 1.0 and 0"),
        ({"times": descending(1, -0.1)}, "to -0.1"),
        ({"times": descending(1)}, "two points or more"),
        ({"times": torch.tensor([1.0, 0.0])}, "times are torch.float32"),
        ({"keep": [0, 3]}, r"keep \[0, 3\]: give ascending grid indices between 0 and 2"),
        ({"keep": [-1]}, "keep"),
        ({"keep": [2, 1]}, "keep"),
        ({"keep": [1, 1]}, "keep"),
        ({"keep": []}, "keep"),
    ],
)
def test_mistakes_are_named_in_one_line_before_any_call(change, message):
    def never(x_t, t, condition):
        raise AssertionError("called")

    arguments = {"times": descending(1, 0.5, 0), **change}
    with pytest.raises(ValueError, match=message) as caught:
        solve(never, RectifiedFlow(), noise(2, 2), arguments.pop("times"), **arguments)
    assert "\n" not in str(caught.value)


def test_an_answer_of_another_shape_is_refused():
    """A [B, 1] answer for a [B, 2] state would broadcast in silence."""
    times = torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"answers \[3, 1\] for \[3, 2\]"):
        solve(lambda x, t, condition: x[:, :1], VE(), torch.zeros(3, 2), times)
