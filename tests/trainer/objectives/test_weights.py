"""Weights of times: the fixed ones by their formulas, the learned one by its known optimum."""

import pytest
import torch

from limbeck.diffusion.process import VE, CosineVP, LinearVP, RectifiedFlow
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.uncertainty import Uncertainty
from limbeck.trainer.objectives.distances import l2
from limbeck.trainer.objectives.flow_map import FlowMapOracle
from limbeck.trainer.objectives.weights import Weighting, time_weight
from tests.trainer.flows import minimise, names, shuffled, table_student, trajectories

PROCESSES = [VE(), LinearVP(), CosineVP(), RectifiedFlow()]
GRID = (80.0, 8.0, 1.0, 0.0)
PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_fixed_weights_are_their_formulas(process):
    t = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64) * process.T
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    assert time_weight("uniform", process, t).tolist() == [1, 1, 1]
    torch.testing.assert_close(time_weight("snr", process, t), snr, rtol=1e-12, atol=0)
    truncated = time_weight("truncated_snr", process, t)
    assert truncated.tolist() == [max(weight, 1.0) for weight in snr.tolist()]
    assert truncated.dtype == torch.float64


def test_fixed_weights_at_known_points():
    t = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    assert time_weight("snr", RectifiedFlow(), t).tolist() == pytest.approx([0, 1, 16])
    assert time_weight("truncated_snr", RectifiedFlow(), t).tolist() == pytest.approx([1, 1, 16])
    loss = torch.tensor([2.0, 3.0, 5.0])
    networks = Networks(table_student(RectifiedFlow(), (1.0, 0.0)))
    assert Weighting("snr")(networks, loss, t).tolist() == pytest.approx([0, 3, 80])
    assert torch.equal(Weighting("uniform")(networks, loss, t), loss)


def learned_on(student, batch) -> Networks:
    """Networks whose weighting is fitted to the flow-map losses of a student that stays."""
    networks = Networks(student, weighting=Uncertainty(0).double())
    objective = FlowMapOracle(GRID, names(GRID), l2, Weighting("learned"))
    minimise(objective, networks, batch, fitted=networks.weighting)
    return networks


def test_the_learned_weights_optimum_is_the_log_of_each_times_expected_loss():
    """min over u of E[loss]/exp(u) + u: u(s, t) = log E[loss | s, t], which the losses of 6 pairs tell apart."""
    student, batch = shuffled(table_student(VE(), GRID)), trajectories(VE(), GRID, rows=96)
    networks, times = learned_on(student, batch), torch.tensor(GRID, dtype=torch.float64)
    s, t = times[torch.tensor(PAIRS)].T
    with torch.no_grad():
        found = networks.weighting(VE(), s, t)
        losses = [
            l2(student.jump(batch.states[f"state_{i}"][rows], times[i], times[j]), batch.states[f"state_{j}"][rows])
            for (i, j), rows in zip(PAIRS, torch.arange(96).split(16), strict=True)  # even uniforms
        ]
    expected = torch.stack(losses).mean(1).log()
    assert expected.max() - expected.min() > 5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)


def test_at_the_optimum_every_time_counts_alike_whatever_its_loss():
    """Twice as large errors at one pair change the student's gradient there by 2/4."""
    student, batch = shuffled(table_student(VE(), GRID)), trajectories(VE(), GRID, rows=96)
    networks = learned_on(student, batch)
    weighed = FlowMapOracle(GRID, names(GRID), l2, Weighting("learned"))(networks, batch)
    plain = FlowMapOracle(GRID, names(GRID), l2, Weighting("uniform"))
    # Each loss over its own expectation: E[loss/exp(u)] = 1, of which u = log E[loss] leaves 1 + E[u].
    with torch.no_grad():
        u = networks.weighting(VE(), *torch.tensor(GRID, dtype=torch.float64)[torch.tensor(PAIRS)].T)
    assert weighed.item() == pytest.approx(1 + u.mean().item(), abs=0.01)
    ours = torch.autograd.grad(weighed, student.denoiser.network.w)[0]
    theirs = torch.autograd.grad(plain(networks, batch), student.denoiser.network.w)[0]
    for (i, j), each in zip(PAIRS, u, strict=True):
        assert ours[i, j].item() == pytest.approx((theirs[i, j] / each.exp()).item(), rel=1e-4)


def test_the_learned_weight_starts_at_none_and_is_finite_at_both_ends():
    for process in PROCESSES:
        ends = torch.tensor([process.T, 0.0], dtype=torch.float64)
        assert Uncertainty(0)(process, ends, ends.flip(0)).tolist() == [0, 0]
    loss, networks = torch.tensor([0.5, 2.0]), Networks(table_student(VE(), GRID), weighting=Uncertainty(0))
    assert torch.equal(Weighting("learned")(networks, loss, torch.tensor([80.0, 1.0]).double()), loss)


def test_the_learned_weights_features_follow_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (
        torch.cat([buffer.flatten() for buffer in Uncertainty(seed).buffers()]) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
