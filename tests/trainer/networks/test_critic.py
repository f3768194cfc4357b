"""The networks beside a student of dmd, vsd and sid: what they hold, share and answer, and fits with them."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.diffusion.denoiser import Guided
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.models.teachers import Teacher, from_checkpoint, load_teacher
from limbeck.storage_schemas.errors import UsageError
from limbeck.trainer.config import FitConfig
from limbeck.trainer.loop import Stepper, step_seed
from limbeck.trainer.networks.critic import FrozenTeacher
from limbeck.trainer.networks.lora import with_low_rank
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.student import Shape
from limbeck.trainer.objectives.dmd import DistributionMatching
from limbeck.trainer.objectives.randomness import normal
from limbeck.trainer.objectives.sid import ScoreIdentity
from limbeck.trainer.objectives.vsd import VariationalScore
from limbeck.trainer.planning.plan import fresh
from limbeck.trainer.planning.start import critic_of, gather, real_score
from limbeck.trainer.ranks import alone
from limbeck.trainer.runs.trees import read_tree, write_tree
from limbeck.trainer.stream import Batch, objective_uniforms

REPOSITORY = Path(__file__).parents[3]
CPU, ROWS = torch.device("cpu"), 16
SPEC: dict[str, Any] = {
    "kind": "network",
    "sample_shape": [1, 4, 4],
    "num_classes": 3,
    "process": {"name": "ve", "sigma_max": 80.0},
    "prediction": {"name": "edm", "sigma_data": 0.5},
    "network": {"name": "residual_mlp", "width": 24, "depth": 2},
}
OPTIONS = {"times": (80.0, 0.0), "critic_steps": 1, "t_range": (0.02, 0.98), "seed": 0}


def network_teacher(seed: int = 0, spec: dict[str, Any] = SPEC) -> Teacher:
    """One whose layers that start at 0 don't."""
    torch.manual_seed(seed)
    module = model_from_spec(spec)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return from_checkpoint("teacher", Checkpoint(spec, pack(module)))


def config(name: str = "dmd", **options: Any) -> FitConfig:
    defaults = {"out": "run", "data": "pairs", "steps": 20, "warmup": 2, "batch_size": ROWS, "lr": 1e-3, "ema": 0.9}
    objective = {"name": name, **options.pop("objective", {})}
    return FitConfig(**{**defaults, **options, "objective": objective})


def student(seed: int = 1, spec: dict[str, Any] = SPEC) -> FlowMap:
    return FlowMap(network_teacher(seed, spec).denoiser.requires_grad_(True))


def networks_of(
    fit: FitConfig,
    teacher: Teacher | None = None,
    fitted: FlowMap | None = None,
    *,
    guidance: tuple[float, ...] = (1.0,),
) -> Networks:
    teacher, fitted = teacher or network_teacher(), fitted or student()
    critic = critic_of(fit, teacher, fitted.denoiser)
    return Networks(fitted, teacher=real_score(fit, teacher, guidance=guidance, device=CPU), critic=critic)


def batch(step: int = 0, rows: int = ROWS) -> Batch:
    positions = step * rows + torch.arange(rows)
    noise = 80 * normal(0, "x_T", positions, (1, 4, 4))
    return Batch(
        positions=positions,
        ids=positions,
        condition=positions % 4 - 1,
        states={"noise": noise, "output": 0.5 + noise / 160},
        uniforms=objective_uniforms(0, positions.numpy(), 3),
        guidance=1 + (positions % 3).double(),
    )


def question(rows: int = 6) -> tuple[torch.Tensor, ...]:
    t = torch.linspace(0.1, 40, rows, dtype=torch.float64)
    return normal(1, "x_t", torch.arange(rows), (1, 4, 4)), t, torch.arange(rows) % 4 - 1, torch.ones(rows).double()


@pytest.mark.parametrize("kind", ["copy", "lora"])
def test_a_critic_starts_as_the_teacher(kind):
    teacher = network_teacher()
    critic = critic_of(config(critic={"kind": kind, "rank": 4}), teacher, student().denoiser)
    x_t, t, stored, guidance = question()
    told = torch.where(stored < 0, 3, stored)
    assert torch.equal(critic(x_t, t, stored, guidance), teacher.denoiser(x_t, t, told))


def test_a_critic_of_a_teacher_in_closed_form_starts_as_the_student():
    teacher, fitted = load_teacher("builtin:gaussian"), student()
    x_t, t, stored, guidance = question()
    critic = critic_of(config(), teacher, fitted.denoiser)
    assert torch.equal(critic(x_t, t, stored, guidance), fitted(x_t, t, torch.where(stored < 0, 3, stored)))
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in fitted.parameters()}


def test_a_critic_is_told_guidance_where_the_student_is():
    told = {**SPEC, "network": {**SPEC["network"], "told_guidance": True}}
    teacher = network_teacher()
    critic = critic_of(config(told_guidance=True), teacher, student(spec=told).denoiser)
    x_t, t, stored, guidance = question()
    before = critic(x_t, t, stored, guidance)
    assert torch.equal(before, teacher.denoiser(x_t, t, torch.where(stored < 0, 3, stored)))
    nn.init.normal_(critic.denoiser.network.guidance[-1].weight)
    assert (critic(x_t, t, stored, guidance) - critic(x_t, t, stored, 3 * guidance)).abs().max() > 1e-2


def test_low_rank_changes_are_all_that_is_fitted_and_saved():
    teacher, fit = network_teacher(), config("vsd", critic={"kind": "lora", "rank": 4, "lr": 0.1})
    before = copy.deepcopy(teacher.denoiser.state_dict())
    networks = networks_of(fit, teacher)
    shared = {id(p) for p in teacher.denoiser.parameters()}
    assert sum(id(p) in shared for p in networks.critic.parameters()) == len(shared)
    stepper = Stepper(networks, fit, alone(CPU))
    for step in range(3):
        stepper.step(VariationalScore(**OPTIONS), batch(step), seed=step_seed(0, step))
    after = teacher.denoiser.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # 9 layers of A and B: time (64 and 24 in), enter, leave, and enter, modulate, leave of 2 blocks.
    state = networks.critic.state_dict()
    sizes = [(24, 64), (24, 24), (24, 16), (16, 24), *[(24, 24), (48, 24), (24, 24)] * 2]
    assert sum(tensor.numel() for tensor in state.values()) == sum(4 * (out + into) for out, into in sizes)
    assert all(name.endswith((".a", ".b")) for name in state)
    moved = [tensor.abs().max() > 1e-3 for name, tensor in state.items() if name.endswith(".b")]
    assert len(moved) == len(sizes)
    assert all(moved)


def test_a_convolution_changes_by_its_low_rank_product():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))
    changed, x = with_low_rank(plain, 2), torch.randn(2, 3, 6, 6)
    low = changed[0].parametrizations.weight[0]
    nn.init.normal_(low.b)
    kernel = plain[0].weight + torch.einsum("or,ricd->oicd", low.b, low.a.view(2, 3, 3, 3))
    torch.testing.assert_close(changed(x), nn.functional.conv2d(x, kernel, plain[0].bias, padding=1))


def test_a_teacher_is_guided_as_it_is_told():
    teacher, (x_t, t, stored, _) = network_teacher(), question()
    guidance = torch.linspace(1, 3, 6, dtype=torch.float64)
    labels = torch.where(stored < 0, 3, stored)
    denoiser, calls = teacher.denoiser, []
    denoiser.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))

    def answer(fit: FitConfig, scales: tuple[float, ...]) -> torch.Tensor:
        calls.clear()
        return real_score(fit, teacher, guidance=scales, device=CPU)(x_t, t, stored, guidance)

    assert torch.equal(answer(config(), (1.0,)), denoiser(x_t, t, labels))
    assert calls[:1] == [6]
    assert torch.equal(answer(config(), (2.0,)), Guided(denoiser, 2.0)(x_t, t, labels))
    assert torch.equal(answer(config(), (1.0, 2.0, 3.0)), Guided(denoiser, guidance)(x_t, t, labels))
    assert torch.equal(answer(config(objective={"guidance": 1.5}), (2.0,)), Guided(denoiser, 1.5)(x_t, t, labels))
    assert torch.equal(answer(config(objective={"guidance": 1.0}), (2.0,)), denoiser(x_t, t, labels))


def gathered(fit: FitConfig, teacher: Teacher) -> Networks:
    """As a fit gathers it, on samples of two guidance scales."""
    plan: Any = SimpleNamespace(teacher=lambda device: teacher, guidance=(1.0, 2.0))
    return gather(fit, plan, student())


def gradients(fit: FitConfig) -> torch.Tensor:
    """Of sid's student and critic, whose way back leads through the teacher's input."""
    networks = gathered(fit, network_teacher())
    objective = ScoreIdentity(**OPTIONS)
    found = torch.autograd.grad(objective(networks, batch()), list(networks.student.parameters()))
    critic = torch.autograd.grad(objective.critic_loss(networks, batch()), list(networks.critic.parameters()))
    return torch.cat([part.flatten() for part in (*found, *critic)])


ANSWERS = {
    "integers": (lambda x: x.to(torch.int64), "answers int64:"),
    "booleans": (lambda x: x > 0, "answers bool:"),
    "complex numbers": (lambda x: torch.complex(x, x), "answers complex64:"),
    "a mean": (lambda x: x.mean((1, 2, 3), keepdim=True), r"answers \[.*, 1, 1, 1\] for"),
    "one sample": (lambda x: x[:1], r"answers \[1, 1, 4, 4\] for"),
    "flat": (lambda x: x.flatten(1), r"answers \[.*, 16\] for"),
    "a tuple": (lambda x: (x,), "answers tuple:"),
    "nothing": (lambda x: None, "answers NoneType:"),
}


class Answering(nn.Module):
    """A teacher of the user's own that answers something else than x_0."""

    num_classes = 3

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x_t, t, condition=None):
        return self.answer(x_t)


@pytest.mark.parametrize(("answer", "told"), ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("scale", [1.0, 2.0, None])
@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_that_answers_no_x_0_is_refused_in_a_line(answer, told, scale, offload):
    teacher = FrozenTeacher(Answering(answer), scale=scale, offload=offload, device=CPU)
    x_t, t = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, dtype=torch.float64)
    with pytest.raises(UsageError, match=told) as refused:
        teacher(x_t, t, torch.tensor([0, 1]), torch.full((2,), 2.0, dtype=torch.float64))
    assert "\n" not in str(refused.value)


def test_memory_knobs_change_nothing_but_a_teacher_in_half_precision():
    plain = gradients(config("sid"))
    assert torch.equal(gradients(config("sid", teacher={"offload": True})), plain)
    assert torch.equal(gradients(config("sid", gradient_checkpointing=True)), plain)
    assert torch.equal(gradients(config("sid", gradient_checkpointing=True, teacher={"offload": True})), plain)
    low = gradients(config("sid", teacher={"dtype": "bfloat16"}))
    assert 0 < (low - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize(
    ("name", "options", "times"),
    [
        ("sid", {}, 1),
        ("sid", {"gradient_checkpointing": True}, 2),
        ("sid", {"gradient_checkpointing": True, "teacher": {"offload": True}}, 2),
        ("vsd", {"gradient_checkpointing": True}, 1),  # whose gradient does not lead through it
    ],
)
def test_checkpointed_blocks_of_a_teacher_run_again_where_a_gradient_leads_through_them(name, options, times):
    teacher, calls = network_teacher(), []
    fit = config(name, **options)
    networks = gathered(fit, teacher)
    teacher.denoiser.network.blocks[0].enter.register_forward_pre_hook(lambda *_: calls.append(1))
    ALTERNATING[name](networks, batch()).backward()
    assert len(calls) == times


def test_an_offloaded_teacher_answers_again_for_a_gradient():
    teacher, (x_t, *rest) = network_teacher(), question()
    calls = []
    teacher.denoiser.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    fit = config("sid", teacher={"offload": True})
    answer = real_score(fit, teacher, guidance=(1.0,), device=CPU)(x_t.requires_grad_(), *rest)
    assert len(calls) == 1
    answer.sum().backward()
    assert len(calls) == 2
    assert x_t.grad is not None


@pytest.mark.gpu
def test_an_offloaded_teacher_leaves_the_gpu():
    device, fit = torch.device("cuda"), config("sid", teacher={"offload": True})
    plain, away = (network_teacher() for _ in range(2))
    plain.denoiser.to(device)
    found = []
    for teacher, told in ((plain, config("sid")), (away, fit)):
        x_t, t, stored, guidance = (tensor.to(device) for tensor in question())
        answer = real_score(told, teacher, guidance=(1.0,), device=device)(x_t.requires_grad_(), t, stored, guidance)
        answer.square().sum().backward()
        found.append((answer.detach(), x_t.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {p.device.type for p in away.denoiser.parameters()} == {"cpu"}


ALTERNATING = {
    "dmd": DistributionMatching(**{**OPTIONS, "critic_steps": 2}, regression=0.25, gan=0.1),
    "vsd": VariationalScore(**{**OPTIONS, "times": (80.0, 2.0, 0.0), "critic_steps": 3}),
    "sid": ScoreIdentity(**OPTIONS),
}
FITS = {
    "dmd": {"objective": {"gan": 0.1, "critic_steps": 2}, "critic": {"ema": 0.8}},
    "vsd": {"objective": {"student_steps": 2, "critic_steps": 3}, "critic": {"kind": "lora", "rank": 2}},
    "sid": {"weight_decay": 0.01},
}


def run(stepper: Stepper, name: str, steps: range) -> list[dict[str, float]]:
    told = []
    for step in steps:
        found = stepper.step(ALTERNATING[name], batch(step), seed=step_seed(0, step), number=step)
        told.append({key: value.item() for key, value in found.items()})
    return told


@pytest.mark.parametrize("name", ALTERNATING)
def test_resume_from_a_state_on_disk_is_bit_identical(name, tmp_path):
    fit = config(name, **FITS[name])
    whole, first, second = (Stepper(networks_of(fit), fit, alone(CPU)) for _ in range(3))
    figures = run(whole, name, range(10))
    run(first, name, range(4))
    write_tree(first.state_dict(), tmp_path)
    second.load_state_dict(read_tree(tmp_path))
    assert run(second, name, range(4, 10)) == figures[4:]
    assert _same(second.state_dict(), whole.state_dict())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def test_the_student_is_updated_after_each_round_of_its_critic():
    fit = config("dmd", objective={"gan": 0.1, "critic_steps": 2})
    stepper = Stepper(networks_of(fit), fit, alone(CPU))
    assert [set(found) for found in run(stepper, "dmd", range(4))] == [
        {"critic_loss", "critic_grad_norm"},
        {"critic_loss", "critic_grad_norm", "loss", "grad_norm"},
    ] * 2


def test_micro_batches_give_the_batch_gradient():
    figures = []
    for micro_batch in (None, 4):
        fit = config("dmd", micro_batch=micro_batch, clip=0, objective={"gan": 0.1, "critic_steps": 2})
        figures += [run(Stepper(networks_of(fit), fit, alone(CPU)), "dmd", range(2))]
    for whole, cut in zip(*figures, strict=True):
        assert cut == pytest.approx(whole, rel=1e-5)


def gaussian_fit(
    name: str, *, steps: int = 250, rows: int = 128, numbers: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) of a student of lines, its critic of lines too, fitted to N(0.5, 0.25)."""
    spec = {"kind": "gaussian", "process": SPEC["process"], "mean": 0.5, "variance": 0.25}
    shape = {"sample_shape": [numbers], "num_classes": None}
    teacher = from_checkpoint("gaussian", Checkpoint({**spec, **shape}, b""))
    fit = config(
        name, init="scratch", network={"name": "affine"}, steps=steps, warmup=50, batch_size=rows, clip=0, ema=0.95,
        critic={"lr": 1e-2},
    )  # fmt: skip
    fitted = FlowMap(fresh(fit, Shape((numbers,), None, SPEC["process"], 0.7)).build())
    with torch.no_grad():  # samples begin near N(0, 0.2): without spread they could spread to either side
        fitted.denoiser.network.coefficients.bias[:numbers] = 0.6
    stepper = Stepper(networks_of(fit, teacher, fitted), fit, alone(CPU))
    for step in range(steps):
        positions = step * rows + torch.arange(rows)
        states = {"noise": 80 * normal(0, "x_T", positions, (numbers,))}
        labels, uniforms = torch.full((rows,), -1), objective_uniforms(0, positions.numpy(), 3)
        drawn = Batch(positions, positions, labels, states, uniforms, torch.ones(rows).double())
        stepper.step(PLAIN[name], drawn, seed=0, number=step)
    T, zero = torch.tensor([80.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        ends = torch.tensor([[0.0], [80.0]]).expand(2, numbers)
        mean, past = FlowMap(stepper.served).jump(ends, T, zero)
    return mean, past - mean


PLAIN = {"dmd": DistributionMatching(**OPTIONS), "vsd": VariationalScore(**OPTIONS), "sid": ScoreIdentity(**OPTIONS)}


@pytest.mark.parametrize("name", PLAIN)
def test_a_student_and_its_critic_reach_the_data(name):
    mean, spread = gaussian_fit(name)
    torch.testing.assert_close(mean, torch.full((4,), 0.5), rtol=0, atol=0.04)
    torch.testing.assert_close(spread, torch.full((4,), 0.5), rtol=0, atol=0.07)


@pytest.mark.faults
def test_two_ranks_fit_as_one_does(tmp_path):
    """Whole or sharded, with a checkpoint in the middle: the same losses and norms of gradients."""
    from tests.trainer.matching_on_ranks import CASES, figures

    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.trainer.matching_on_ranks",
    ]
    (tmp_path / "ranks").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "ranks")],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "ranks" / "told.json").read_text())
    for name, case in CASES.items():
        for one, two in zip(figures(case, alone(CPU), tmp_path / name), told[name], strict=True):
            assert two == pytest.approx(one, rel=2e-4), name
