"""Labels and guidance as what a student is told: pairs at several scales, fitted, give each scale its own answer.

Of Gaussian classes the guided output is linear in the scale, so a student that isn't told it has a known optimum too:
the output at the mean scale.
"""

import copy
from dataclasses import replace

import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.models.checkpoint import widened
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.process import VE
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.trainer.config import FitConfig
from limbeck.trainer.evaluation.contenders import student
from limbeck.trainer.evaluation.holdout import read_pairs
from limbeck.trainer.networks.student import find_student
from limbeck.trainer.objectives import table
from limbeck.trainer.planning.start import gather, real_score
from limbeck.trainer.planning.trajectories import plan_trajectories
from limbeck.trainer.stream import Batch, Stream
from tests.guided import MEANS, VARIANCE, exact_output
from tests.trainer.conftest import write_store
from tests.trainer.test_fit import fit, metrics

CPU = torch.device("cpu")
CLASSES = "python:tests.guided:GaussianClasses"
SCALES = (1.0, 2.0, 4.0)
COUNT, STEPS = 2048, 150
SMALL = ("--init", "scratch", "--network.width", 64, "--network.depth", 2, "--threads", 1, "--ema", 0.95)
SHORT = ("--steps", STEPS, "--batch-size", 128, "--lr", 3e-3, "--warmup", 20)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "store"
    return write_store(folder, count=COUNT, samples_per_shard=1024, guidance=SCALES)


@pytest.fixture(scope="module")
def told_run(several, tmp_path_factory):
    return fitted(several, tmp_path_factory.mktemp("told") / "run", "--told-guidance")


def fitted(store, out, *words):
    given = ("--data", store.uri, "--out", out, "--objective.name", "knowledge", *SMALL, *SHORT, *words)
    assert fit(*given) == 0
    return out


@torch.no_grad()
def error(run, store, asked, exact_at) -> float:
    """Root mean square of the student's outputs for the holdout's noises, all asked at one scale, from the exact ones.

    exact_at: the scale of each class.
    """
    pairs = read_pairs(open_dataset(store), "holdout", None, at_most=64)
    flow_map = FlowMap(find_student(run, 1).build())
    scales = torch.full((len(pairs),), asked, dtype=torch.float64)
    found = flow_map.sample(pairs.noise, torch.tensor([80.0, 0.0]).double(), pairs.condition, guidance=scales)
    exact = exact_output(pairs.noise, pairs.condition, torch.tensor(exact_at)[pairs.condition])
    return float((found - exact).square().mean().sqrt())


def test_a_told_student_answers_each_scale_by_its_own(several, told_run):
    """Between the answers at 1 and at 4 lie 4 rms."""
    assert max(error(told_run, several, scale, [scale] * 3) for scale in SCALES) < 0.15
    assert error(told_run, several, 1.0, [4.0] * 3) > 3


def test_a_told_student_is_validated_and_compared_at_each_samples_scale(several, told_run):
    assert metrics(told_run)[-1]["holdout_error"] < 0.15**2
    dataset = open_dataset(several)
    pairs = read_pairs(dataset, "holdout", None, at_most=64)
    found = student(told_run, 1, dataset.recipe, device=CPU).outputs(pairs, batch=24, device=CPU)
    assert float((found - pairs.output).square().mean()) == pytest.approx(metrics(told_run)[-1]["holdout_error"], 1e-3)


def test_a_student_that_is_not_told_answers_the_mean_scale_and_is_warned_of(several, tmp_path, capsys):
    run = fitted(several, tmp_path / "run")
    told = "the data holds guidance scales 1, 2, 4, and this student doesn't take them: it learns their mixture"
    assert told in capsys.readouterr().err
    drawn = noise.guidance_scales(0, "train", range(COUNT), SCALES)
    labels = noise.labels(0, "train", range(COUNT), 3)
    mean = [drawn[labels == label].mean() for label in range(3)]
    assert error(run, several, 1.0, mean) == error(run, several, 4.0, mean) < 0.3
    assert min(error(run, several, scale, [scale] * 3) for scale in (1.0, 4.0)) > 1.5


def test_a_student_that_was_told_goes_on_being_told(several, told_run, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("--objective.name", "knowledge", "--init", told_run, "--steps", 1, "--warmup", 0)
    assert fit("--data", several.uri, "--out", run, *words) == 0
    assert find_student(run, 1).model["network"]["told_guidance"]
    assert "doesn't take" not in capsys.readouterr().err


def test_scales_that_cannot_be_told_are_refused(tmp_path, capsys):
    """A network is told log(1 + w): no number, at -1 and below."""
    store = write_store(tmp_path / "store", count=64, guidance=(-1.0, 2.0))
    words = ("--data", store.uri, "--out", tmp_path / "run", "--objective.name", "knowledge", *SMALL, *SHORT)
    assert fit(*words, "--told-guidance") == 2
    assert "guidance scale -1 can't be given to a student, only 0 and more" in capsys.readouterr().err


def test_one_scale_is_baked_into_a_student_that_is_not_told(tmp_path):
    store = write_store(tmp_path / "store", count=COUNT, samples_per_shard=1024, guidance=4.0)
    run = fitted(store, tmp_path / "run", "--steps", 100)
    assert error(run, store, 1.0, [4.0] * 3) < 0.15


OBJECTIVES = {
    "knowledge": {},
    "progressive": {"schedule": (4, 2)},
    "flow_map": {},
    "ctm": {},
    "consistency": {},
    "reflow": {},
    "dmd": {"student_steps": 2},
    "vsd": {},
    "sid": {},
}


class Heard:
    """What a network is told in every call: pairs (label, guidance) of the rows."""

    def __init__(self, network) -> None:
        self.pairs: list[tuple[int, float]] = []
        network.register_forward_pre_hook(self)

    def __call__(self, network, inputs) -> None:
        _, _, labels, _, log_scale = inputs
        self.pairs += zip(labels.tolist(), torch.expm1(log_scale.double()).round().tolist(), strict=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_tells_every_network_each_rows_own_label_and_scale(several, tmp_path, name):
    """Also where labels are missing: then the null label, and for a guided teacher its answer without a label."""
    beside = {"teacher": {"uri": CLASSES}} if table.OBJECTIVES[name].has_critic else {}
    config = FitConfig(
        out=tmp_path, data=several.uri, init="scratch", told_guidance=True,
        network={"width": 8, "depth": 1}, objective={"name": name, **OBJECTIVES[name]}, **beside,
    )  # fmt: skip
    plan = plan_trajectories(config, number=None)
    made = widened(plan.start(), second_time=table.OBJECTIVES[name].takes_target_time, told_guidance=True).build()
    networks = gather(config, plan, FlowMap(made))
    networks.target = FlowMap(copy.deepcopy(made)) if networks.target is None else networks.target
    asked = networks.teacher = Asked(networks.teacher)
    denoisers = [made, networks.target.denoiser, *([networks.critic.denoiser] if networks.critic else [])]
    heard = [Heard(denoiser.network) for denoiser in denoisers]
    batch = marked(plan, plan.stages[0].objective)
    ask_all(plan.stages[0].objective, networks, batch)
    told = {(3 if label < 0 else label, scale) for label, scale in zip(LABELS, GUIDANCE, strict=True)}
    assert set(heard[0].pairs) == told
    assert all(set(other.pairs) <= told for other in heard[1:])
    if networks.critic:
        assert set(heard[2].pairs) == told
        assert asked.pairs == set(zip(LABELS, GUIDANCE, strict=True))


LABELS = [-1, 0, 1, 2, -1, 0, 1, 2]
GUIDANCE = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


class Asked:
    """The real score, and the stored labels and scales that it was asked at."""

    def __init__(self, teacher) -> None:
        self.teacher, self.pairs = teacher, set[tuple[int, float]]()

    def __call__(self, x_t, t, stored, guidance):
        self.pairs |= set(zip(stored.tolist(), guidance.tolist(), strict=True))
        return self.teacher(x_t, t, stored, guidance)


def marked(plan, objective) -> Batch:
    """A batch as the stream makes it, with a label and a scale by which each row is known."""
    with Stream(plan.source(objective.columns), batch_size=8, seed=0, num_uniforms=objective.num_uniforms) as stream:
        batch = next(stream).each(torch.clone).to(CPU)
    return replace(batch, condition=torch.tensor(LABELS), guidance=torch.tensor(GUIDANCE, dtype=torch.float64))


def ask_all(objective, networks, batch) -> None:
    objective(networks, batch)
    if networks.critic:
        objective.critic_loss(networks, batch)


@pytest.mark.parametrize(
    ("told", "of_the_data", "used"),
    [(None, SCALES, GUIDANCE), (None, (4.0,), [4.0] * 8), (3.0, SCALES, [3.0] * 8), (1.0, SCALES, [1.0] * 8)],
)
def test_the_real_score_is_the_data_s_guided_as_they_were_or_as_told(several, tmp_path, told, of_the_data, used):
    """Rows without a label have the score of the null label, N(0, v), at every scale."""
    config = FitConfig(out=tmp_path, data=several.uri, objective={"name": "dmd", "guidance": told})
    real = real_score(config, load_teacher(CLASSES), guidance=of_the_data, device=CPU)
    generator = torch.Generator().manual_seed(0)
    x_t, t = 3 * torch.randn(8, 2, generator=generator).double(), torch.linspace(0.1, 9.0, 8).double()
    found = real(x_t, t, torch.tensor(LABELS), torch.tensor(GUIDANCE).double())
    means = [0.0 if label < 0 else scale * MEANS[label] for label, scale in zip(LABELS, used, strict=True)]
    exact = [GaussianTeacher(VE(), mean=m, variance=VARIANCE)(x_t[i], t[i]) for i, m in enumerate(means)]
    torch.testing.assert_close(found, torch.stack(exact))
