"""Flow-map objectives against the exact flow of Gaussian data, and whole fits of them."""

import copy
import itertools

import pytest
import torch

from limbeck.diffusion.flow_map import FlowMap, jump_coefficients
from limbeck.diffusion.grids import karras
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.ctm import ConsistencyTrajectory
from limbeck.trainer.objectives.distances import PseudoHuber, l1, l2
from limbeck.trainer.objectives.flow_map import FlowMapOracle
from limbeck.trainer.objectives.stored import drawn
from limbeck.trainer.objectives.weights import Weighting
from tests.trainer.flows import (
    MEAN,
    VARIANCE,
    batch_of,
    even_uniforms,
    minimise,
    names,
    perfect_student,
    shuffled,
    table_student,
    trajectories,
)

GRIDS = {
    VE(): (80.0, 8.0, 1.0, 0.0),
    LinearVP(): (1.0, 0.6, 0.25, 0.0),
    CosineVP(): (1.0, 0.7, 0.4, 0.0),
    RectifiedFlow(): (1.0, 0.7, 0.3, 0.0),
}
PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]
TRIPLES = [(i, k, j) for i in range(4) for k in range(i + 1, 4) for j in range(k, 4)]

every_process = pytest.mark.parametrize("process", GRIDS, ids=lambda process: type(process).__name__)


def flow_map(process, distance=l2, weighting="uniform") -> FlowMapOracle:
    return FlowMapOracle(GRIDS[process], names(GRIDS[process]), distance, Weighting(weighting))


def ctm(process, distance=l2, weighting="uniform", denoising_weight=0.0) -> ConsistencyTrajectory:
    grid = GRIDS[process]
    return ConsistencyTrajectory(grid, names(grid), distance, Weighting(weighting), denoising_weight, seed=3)


def at(process) -> torch.Tensor:
    return torch.tensor(GRIDS[process], dtype=torch.float64)


def check_exact(student: FlowMap, process, *, atol: float) -> None:
    """All jumps between the grid's times, on unseen trajectories."""
    batch, times = trajectories(process, GRIDS[process], rows=32, seed=9), at(process)
    with torch.no_grad():
        for i, j in PAIRS:
            jumped = student.jump(batch.states[f"state_{i}"], times[i], times[j])
            torch.testing.assert_close(jumped, batch.states[f"state_{j}"], rtol=0, atol=atol)


def test_each_row_compares_its_own_states_and_all_choices_are_as_likely():
    states = {f"state_{k}": torch.arange(60.0)[:, None] + 100 * k for k in range(4)}
    batch, times = batch_of(states, even_uniforms(60, 1)), (80.0, 8.0, 1.0, 0.0)
    for choices in (torch.tensor(PAIRS), torch.tensor(TRIPLES)):
        found, t = drawn(batch, tuple(states), times, choices, batch.uniforms[:, 0])
        index = (found[..., 0] // 100).long()
        assert torch.equal(found[..., 0] % 100, torch.arange(60.0).expand(len(index), 60))
        assert torch.equal(t, torch.tensor(times, dtype=torch.float64)[index])
        rows, counts = torch.unique(index.T, dim=0, return_counts=True)
        assert rows.tolist() == choices.tolist()
        assert counts.tolist() == [60 // len(choices)] * len(choices)
    assert flow_map(VE())._pairs.tolist() == [list(pair) for pair in PAIRS]
    assert ctm(VE())._triples.tolist() == [list(triple) for triple in TRIPLES]


@every_process
@pytest.mark.parametrize("weighting", ["uniform", "truncated_snr"])
def test_flow_map_loss_and_gradient_at_a_point_are_their_closed_forms(process, weighting):
    student = shuffled(table_student(process, GRIDS[process]))
    batch, times = trajectories(process, GRIDS[process], rows=12), at(process)
    loss = flow_map(process, weighting=weighting)(Networks(student), batch)
    loss.backward()
    network, expected = student.denoiser.network, 0.0
    w_grad, b_grad = torch.zeros(2, 4, 4, dtype=torch.float64)
    for row in range(12):
        i, j = PAIRS[row // 2]  # even uniforms
        x_s, x_t = (batch.states[f"state_{k}"][row] for k in (i, j))
        keep, pull = jump_coefficients(process, times[i], times[j])
        error = keep * x_s + pull * (network.w[i, j] * x_s + network.b[i, j]).detach() - x_t
        snr = (process.alpha(times[i]) / process.sigma(times[i])) ** 2
        weight = 1.0 if weighting == "uniform" else max(snr.item(), 1.0)
        expected += weight * error.square().mean().item() / 12
        w_grad[i, j] += weight * (2 * error * pull * x_s).mean() / 12
        b_grad[i, j] += weight * (2 * error * pull).mean() / 12
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(network.w.grad, w_grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.b.grad, b_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("process", "distance"), [(VE(), l2), (LinearVP(), l2), (CosineVP(), PseudoHuber(0.3)), (RectifiedFlow(), l1)]
)
def test_flow_map_is_minimised_by_the_exact_flow_between_all_times(process, distance):
    student = table_student(process, GRIDS[process])
    batch = trajectories(process, GRIDS[process], rows=96)
    minimise(flow_map(process, distance), Networks(student), batch)
    check_exact(student, process, atol=1e-3)


@every_process
def test_the_exact_flow_is_a_fixed_point_of_ctm(process):
    student, target = perfect_student(process), perfect_student(process)
    batch = trajectories(process, GRIDS[process], rows=60, uniforms=2)
    for distance in (l2, PseudoHuber(0.3)):
        loss = ctm(process, distance)(Networks(student, target), batch)
        (gradient,) = torch.autograd.grad(loss, student.denoiser.off)
        assert loss.item() < 1e-18
        assert abs(gradient.item()) < 1e-8


@every_process
def test_ctm_of_an_exact_target_is_minimised_by_the_exact_flow_between_all_times(process):
    student, target = table_student(process, GRIDS[process]), perfect_student(process).requires_grad_(False)
    batch = trajectories(process, GRIDS[process], rows=100, uniforms=2)
    assert minimise(ctm(process), Networks(student, target), batch) < 1e-20
    check_exact(student, process, atol=1e-9)


def test_ctm_gradient_comes_through_the_outer_map_and_stops_at_its_weights():
    process = RectifiedFlow()
    times = at(process)
    student = shuffled(table_student(process, GRIDS[process]), 1)
    target = shuffled(table_student(process, GRIDS[process]), 2).requires_grad_(False)
    batch = trajectories(process, GRIDS[process], rows=20, uniforms=2)
    loss = ctm(process, weighting="snr")(Networks(student, target), batch)
    loss.backward()
    ours, theirs = student.denoiser.network, target.denoiser.network

    def line(network, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        """G = slope x + shift."""
        if i == j:
            return torch.ones(()).double(), torch.zeros(()).double()
        keep, pull = jump_coefficients(process, times[i], times[j])
        return (keep + pull * network.w[i, j]).detach(), (pull * network.b[i, j]).detach()

    expected, w_grad = 0.0, torch.zeros(4, 4, dtype=torch.float64)
    for row in range(20):
        i, k, j = TRIPLES[row // 2]
        x_s, x_u = batch.states[f"state_{i}"][row], batch.states[f"state_{k}"][row]
        inner, outer, step = line(ours, i, j), line(theirs, j, 3), line(theirs, k, j)
        guess = outer[0] * (inner[0] * x_s + inner[1]) + outer[1]
        error = guess - (outer[0] * (step[0] * x_u + step[1]) + outer[1])
        weight = (process.alpha(times[i]) / process.sigma(times[i])) ** 2 / 20
        expected += (weight * error.square().mean()).item()
        w_grad[i, j] += weight * (2 * error * outer[0] * jump_coefficients(process, times[i], times[j])[1] * x_s).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(ours.w.grad, w_grad, rtol=1e-9, atol=1e-12)


def test_ctm_with_itself_as_target_comes_to_the_exact_flow():
    """Each round the target is the student before; its error falls by a constant factor, from data upward."""
    process = RectifiedFlow()
    student = table_student(process, GRIDS[process])
    batch, errors = trajectories(process, GRIDS[process], rows=100, uniforms=2), []
    for _ in range(12):
        target = copy.deepcopy(student).requires_grad_(False)
        minimise(ctm(process), Networks(student, target), batch)
        with torch.no_grad():
            one_step = student.jump(batch.states["state_0"], at(process)[0], at(process)[3])
        errors.append((one_step - batch.states["state_3"]).square().mean().sqrt().item())
    assert errors[0] > 0.05
    assert errors[-1] < 1e-3 * errors[0]
    check_exact(student, process, atol=1e-3)


@every_process
def test_ctms_denoising_term_is_least_at_the_posterior_mean(process):
    rows = 6000
    student = perfect_student(process)
    generator = torch.Generator().manual_seed(4)
    x_0 = MEAN + VARIANCE**0.5 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    batch = batch_of({f"state_{k}": x_0 for k in range(4)}, even_uniforms(rows, 2))
    loss = ctm(process).denoising(Networks(student), batch)
    (gradient,) = torch.autograd.grad(loss, student.denoiser.off)
    alpha, sigma = process.alpha(at(process)[:-1]), process.sigma(at(process)[:-1])
    left = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
    spread = (left.mean() / (3 * rows)).sqrt().item()
    assert loss.item() == pytest.approx(left.mean().item(), abs=4 * 2**0.5 * VARIANCE / (3 * rows) ** 0.5)
    assert abs(gradient.item()) < 4 * 2 * spread
    networks = Networks(student, perfect_student(process))
    whole = ctm(process, denoising_weight=0.5)(networks, batch)
    assert whole.item() == pytest.approx(0.5 * loss.item() + ctm(process).trajectory(networks, batch).item())


@pytest.mark.parametrize(("name", "rounds", "at_most"), [("flow_map", 1, 5e-4), ("ctm", 4, 0.01)])
def test_the_semigroup_error_falls_with_training(name, rounds, at_most):
    """rms of G(G(x, s, u), u, t) - G(x, s, t) over rms of x_t, on unseen trajectories: from 0.16 to a stated number.

    The student is a network with weights shared by all times, so that nothing makes it a semigroup but the fit.
    """
    times = tuple(karras(VE(), 4, r_min=0.02).tolist())
    columns, batch = names(times), trajectories(VE(), times, rows=200, uniforms=2)
    student = two_time_student()
    before = semigroup_error(student, times)
    objective = FlowMapOracle(times, columns, l2, Weighting())
    if name == "ctm":
        objective = ConsistencyTrajectory(times, columns, l2, Weighting(), denoising_weight=0.0, seed=0)
    for _ in range(rounds):
        target = copy.deepcopy(student).requires_grad_(False)
        minimise(objective, Networks(student, target), batch, steps=30)
    assert before == pytest.approx(0.1617, abs=0.001)
    assert semigroup_error(student, times) < at_most


def two_time_student() -> FlowMap:
    """An affine network of weight 0, widened."""
    spec = {
        "kind": "network", "sample_shape": [3], "num_classes": None, "process": {"name": "ve", "sigma_max": 80.0},
        "prediction": {"name": "edm", "sigma_data": 0.5}, "network": {"name": "affine"},
    }  # fmt: skip
    torch.manual_seed(0)
    plain = Checkpoint(spec, pack(model_from_spec(spec)))
    return FlowMap(widened(plain, second_time=True).build().double())


@torch.no_grad()
def semigroup_error(student: FlowMap, times: tuple[float, ...]) -> float:
    """Over all s > u > t alike."""
    batch, at, errors = trajectories(VE(), times, rows=256, seed=5), torch.tensor(times, dtype=torch.float64), []
    for i, k, j in itertools.combinations(range(len(times)), 3):
        x_s, x_t = batch.states[f"state_{i}"], batch.states[f"state_{j}"]
        twice = student.jump(student.jump(x_s, at[i], at[k]), at[k], at[j])
        errors.append((twice - student.jump(x_s, at[i], at[j])).square().mean() / x_t.square().mean())
    return torch.stack(errors).mean().sqrt().item()
