import os
import signal

import pytest
import torch

from limbeck.diffusion.flow_map import FlowMap
from limbeck.trainer.config import FitConfig
from limbeck.trainer.learner import lr_factor
from limbeck.trainer.loop import Stepper, check_device, step_seed, stop_on_signals
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.student import Shape, with_dropout
from limbeck.trainer.objectives.knowledge import Knowledge
from limbeck.trainer.options import ComputeConfig, OptimizationConfig
from limbeck.trainer.planning.plan import fresh
from limbeck.trainer.ranks import alone
from limbeck.trainer.runs.trees import read_tree, write_tree
from limbeck.trainer.stream import Batch

CPU = torch.device("cpu")
SHAPE = Shape((2,), None, {"name": "ve", "sigma_max": 80.0}, 0.7)
OBJECTIVE = Knowledge((80.0, 0.0))


def config(**options) -> FitConfig:
    defaults = {"out": "run", "data": "pairs", "init": "scratch", "steps": 20, "warmup": 5, "batch_size": 16}
    return FitConfig(**{**defaults, **options})


def stepper(*, dropout: float = 0.0, **options) -> Stepper:
    from limbeck.diffusion.models.spec import model_from_spec

    start = fresh(config(), SHAPE)
    denoiser = model_from_spec(with_dropout(start.model, dropout))
    denoiser.load_state_dict(start.build().state_dict())
    return Stepper(Networks(FlowMap(denoiser)), config(**options), alone(CPU))


def batch(step: int, rows: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(step)
    noise = 80 * torch.randn(rows, 2, generator=generator)
    states = {"noise": noise, "output": 0.5 + noise / 160}
    ids, labels, scales = torch.arange(rows), torch.full((rows,), -1), torch.ones(rows).double()
    return Batch(step * rows + ids, ids, labels, states, torch.empty(rows, 0), scales)


def run(stepper: Stepper, steps: range) -> list[float]:
    return [stepper.step(OBJECTIVE, batch(step), seed=step_seed(0, step))["loss"].item() for step in steps]


def weights(stepper: Stepper) -> list[torch.Tensor]:
    return [
        value.clone()
        for value in (*stepper.networks.student.state_dict().values(), *stepper.served.state_dict().values())
    ]


def test_learning_rate_schedule():
    linear = OptimizationConfig(decay="linear", steps=105, warmup=5)
    assert [lr_factor(step, linear) for step in (0, 4, 5, 55, 105)] == [0.2, 1.0, 1.0, 0.5, 0.0]
    cosine = OptimizationConfig(decay="cosine", steps=105, warmup=5)
    assert [round(lr_factor(step, cosine), 12) for step in (5, 30, 55, 105)] == [
        1.0,
        round((1 + 0.5**0.5) / 2, 12),
        0.5,
        0.0,
    ]
    assert lr_factor(1000, OptimizationConfig(decay="none")) == 1.0


def test_resume_from_a_state_dict_on_disk_is_bit_identical(tmp_path):
    options = {"ema": 0.9, "dropout": 0.3, "weight_decay": 0.01}
    whole = stepper(**options)
    losses = run(whole, range(12))
    first = stepper(**options)
    run(first, range(5))
    write_tree(first.state_dict(), tmp_path)
    second = stepper(**options)
    torch.rand(7)  # whatever else draws in between changes nothing
    second.load_state_dict(read_tree(tmp_path))
    assert run(second, range(5, 12)) == losses[5:]
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))


def test_micro_batches_give_the_batch_gradient():
    whole, cut = stepper(clip=0), stepper(clip=0, micro_batch=4)
    found = whole.step(OBJECTIVE, batch(0), seed=0)
    torch.testing.assert_close(cut.step(OBJECTIVE, batch(0), seed=0), found)


def test_clipping_bounds_the_gradient():
    clipped = stepper(clip=1e-3)
    norm = clipped.step(OBJECTIVE, batch(0), seed=0)["grad_norm"]
    now = torch.stack([p.grad.norm() for p in clipped.networks.student.parameters() if p.grad is not None]).norm()
    assert norm > 1e-3
    assert now.item() == pytest.approx(1e-3, rel=1e-3)


def test_average_is_the_recursion_it_claims():
    averaged = stepper(ema=0.5)
    name = "network.leave.bias"
    expected = None
    for step in range(6):
        run(averaged, range(step, step + 1))
        now = averaged.networks.student.denoiser.state_dict()[name].clone()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(averaged.served.state_dict()[name], expected)
    assert stepper(ema=0.0).average is None


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_stage_starts_from_the_served_weights_and_nothing_else_of_the_one_before(ema):
    staged = stepper(ema=ema)
    run(staged, range(4))
    fresh = stepper(ema=ema)
    fresh.networks.student.denoiser.load_state_dict(staged.served.state_dict())
    staged.restart()
    assert run(staged, range(4, 8)) == run(fresh, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(weights(staged), weights(fresh), strict=True))


def test_evaluating_switches_dropout_off_and_on_again():
    dropping = stepper(dropout=0.5)
    with dropping.evaluating() as served:
        assert not served.training
    assert dropping.served.training


def test_bfloat16_autocast_fits_and_float16_on_a_cpu_is_refused():
    low = stepper(autocast="bfloat16", steps=200, lr=1e-2)
    losses = run(low, range(60))
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert all(parameter.dtype == torch.float32 for parameter in low.networks.student.parameters())
    cached = []
    low.student.update(
        lambda *asked: cached.append(torch.is_autocast_cache_enabled()) or OBJECTIVE(*asked), low.networks, batch(0)
    )
    assert cached == [False]  # else PyTorch before 2.11 loses gradients of weights that were asked without one before
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        check_device(ComputeConfig(autocast="float16"), CPU)


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
