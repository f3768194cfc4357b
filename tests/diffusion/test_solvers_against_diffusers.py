"""The same small network at the same times, stepped by diffusers' schedulers and by ours."""

import pytest
import torch
from torch import nn

from limbeck.diffusion.process import VE, DiscreteVP, RectifiedFlow, expand, scales
from limbeck.diffusion.solvers import solve

diffusers = pytest.importorskip("diffusers")

NUM_STEPS = [4, 10, 20, 50]  # divisors of 1000: DDIM's leading spacing is only right there


class Network(nn.Module):
    """A small smooth network of (x, t) with no structure to help a solver."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.layers = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 6))

    @torch.no_grad()
    def forward(self, x, t):
        t = expand(t, like=x).expand(len(x), 1)
        return self.layers(torch.cat([x, t], dim=1))


def noise():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(2))


def table():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return DiscreteVP(tuple(scheduler.betas.tolist()))


def sampled(scheduler, network, x):
    """States of diffusers' own loop; network(model input, scheduler's time) -> what the scheduler expects."""
    states = [x]
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(states[-1], t), t)
        states.append(scheduler.step(output, t, states[-1]).prev_sample)
    return torch.stack(states)


def from_epsilon(network, process):
    """x_0 from a network that predicts eps."""

    def denoise(x_t, t, condition):
        alpha, sigma = scales(process, t, like=x_t)
        return (x_t - sigma * network(x_t, process.network_time(t) / 1000)) / alpha

    return denoise


def grid_of(scheduler):
    """diffusers' timestep n is our t = n + 1; the last step ends at 0."""
    return torch.cat([scheduler.timesteps.double() + 1, torch.zeros(1, dtype=torch.float64)])


def agree(ours, theirs, *, tolerance=4e-6):
    """To float32 rounding at each state's size: diffusers' tables are float32, 1000 products deep."""
    size = theirs.abs().amax(dim=(1, 2))
    assert ((ours - theirs).abs().amax(dim=(1, 2)) <= tolerance * size).all()
    assert (theirs[-1] - theirs[0]).abs().mean() > 0.1  # something happened


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_ddim(num_steps):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(num_steps)
    network, process = Network(), table()
    theirs = sampled(scheduler, lambda x, t: network(x, t.double() / 1000), noise())
    ours = solve(from_epsilon(network, process), process, noise(), grid_of(scheduler), solver="ddim")
    agree(ours.states, theirs)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_dpmpp_2m(num_steps, spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(num_steps)
    network, process = Network(), table()
    theirs = sampled(scheduler, lambda x, t: network(x, t.double() / 1000), noise())
    ours = solve(from_epsilon(network, process), process, noise(), grid_of(scheduler), solver="dpmpp_2m")
    agree(ours.states, theirs)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_unipc(num_steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=2, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    network, process = Network(), table()
    theirs = sampled(scheduler, lambda x, t: network(x, t.double() / 1000), noise())
    ours = solve(from_epsilon(network, process), process, noise(), grid_of(scheduler), solver="unipc")
    agree(ours.states, theirs, tolerance=2e-5)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_deis(num_steps):
    """Theirs ends at the table's first time."""
    scheduler = diffusers.DEISMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=2, lower_order_final=False
    )
    scheduler.set_timesteps(num_steps)
    network, process = Network(), table()
    theirs = sampled(scheduler, lambda x, t: network(x, t.double() / 1000), noise())
    times = torch.cat([scheduler.timesteps.double() + 1, torch.ones(1, dtype=torch.float64)])
    ours = solve(from_epsilon(network, process), process, noise(), times, solver="deis")
    agree(ours.states, theirs, tolerance=2e-5)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_edm_euler(num_steps):
    """The whole of EDM: its preconditioning, its grid, its Euler."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(num_steps)
    network, process = Network(), VE()

    def denoise(x_t, t, condition):
        _, sigma = scales(process, t, like=x_t)
        variance = sigma**2 + 0.25
        inner = network(x_t / variance.sqrt(), torch.log(t) / 4)
        return 0.25 / variance * x_t + sigma * 0.5 / variance.sqrt() * inner

    theirs = sampled(scheduler, lambda x, t: network(x, t.double()), noise() * 80)
    ours = solve(denoise, process, noise() * 80, scheduler.sigmas.double(), solver="ddim")
    agree(ours.states, theirs)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_heun(num_steps):
    """HeunDiscreteScheduler steps y = x/alpha over Karras sigmas; a step of two stages moves on at its second."""
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    scheduler.set_timesteps(num_steps)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    network, process = Network(), VE()

    def epsilon(y, sigma):
        sigma = expand(sigma, like=y)
        return network(y / torch.sqrt(sigma**2 + 1), torch.log(sigma) / 4)

    theirs, stages = [noise() * sigmas[0].float()], [noise() * sigmas[0].float()]
    for n, t in enumerate(scheduler.timesteps):
        stages.append(scheduler.step(epsilon(stages[-1], scheduler.sigmas[n]), t, stages[-1]).prev_sample)
        if n % 2 == 1 or n == len(scheduler.timesteps) - 1:
            theirs.append(stages[-1])
    ours = solve(
        lambda y, t, condition: y - expand(t, like=y) * epsilon(y, t),
        process,
        noise() * sigmas[0].float(),
        sigmas,
        solver="heun",
    )
    assert ours.nfe == len(scheduler.timesteps) == 2 * num_steps - 1
    agree(ours.states, torch.stack(theirs))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_flow_matching_euler(num_steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    scheduler.scale_model_input = lambda x, t: x
    network, process = Network(), RectifiedFlow()
    theirs = sampled(scheduler, lambda x, t: network(x, t.double() / 1000), noise())
    ours = solve(
        lambda x_t, t, condition: x_t - expand(t, like=x_t) * network(x_t, t),
        process,
        noise(),
        scheduler.sigmas.double(),
        solver="ddim",
    )
    agree(ours.states, theirs)
