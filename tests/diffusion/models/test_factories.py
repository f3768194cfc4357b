"""Networks of a user's own: exact ones of a Gaussian, in each form, are its exact denoiser and are solved as such."""

import pytest
import torch
from torch import nn

from limbeck.diffusion.gaussian import GaussianTeacher
from limbeck.diffusion.models.factories import edm, flow, table
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.process import VE, DiscreteVP, RectifiedFlow, scales
from limbeck.diffusion.solvers import solve

BETAS = torch.linspace(1e-3, 0.05, 100).tolist()
MEAN, VARIANCE = 0.5, 0.25


class Exact(nn.Module):
    """What a perfect network answers: `predict(x_0, x, alpha, sigma)` of the Gaussian's x_0 at `times(shown time)`."""

    def __init__(self, process, times, predict):
        super().__init__()
        self.teacher, self.times, self.predict = GaussianTeacher(process, mean=MEAN, variance=VARIANCE), times, predict
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.shown = []

    def forward(self, x, time):
        self.shown.append(time)
        t = self.times(time)
        return self.predict(self.teacher(x, t), x, *scales(self.teacher.process, t, like=x))


def velocity(x_0, x, alpha, sigma):
    return (x - x_0) / sigma


CASES = {
    "flow": lambda: flow(Exact(RectifiedFlow(), lambda time: time, velocity), sample_shape=[2]),
    "flow of timesteps": lambda: flow(
        Exact(RectifiedFlow(), lambda time: time / 1000, velocity), sample_shape=[2], time_scale=1000.0
    ),
    "flow to data at 1": lambda: flow(
        Exact(RectifiedFlow(), lambda time: 1 - time, lambda *given: -velocity(*given)), sample_shape=[2], data_at=1
    ),
    "table": lambda: table(
        Exact(DiscreteVP(tuple(BETAS)), lambda time: time + 1, lambda x_0, x, alpha, sigma: (x - alpha * x_0) / sigma),
        betas=BETAS,
        sample_shape=[2],
    ),
    "table of samples": lambda: table(
        Exact(DiscreteVP(tuple(BETAS)), lambda time: time + 1, lambda x_0, *rest: x_0),
        betas=BETAS,
        sample_shape=[2],
        prediction="sample",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_perfect_network_is_the_exact_denoiser(name):
    denoiser = CASES[name]()
    exact = GaussianTeacher(denoiser.process, mean=MEAN, variance=VARIANCE)
    x = torch.randn(4, 2, dtype=torch.float64)
    for part in (0.9, 0.3):
        t = torch.tensor(part * denoiser.process.T, dtype=torch.float64).round(decimals=0 if "table" in name else 3)
        torch.testing.assert_close(denoiser(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
    ends = torch.tensor([denoiser.process.T, denoiser.process.T / 2], dtype=torch.float64)
    ours = solve(denoiser, denoiser.process, x, ends, solver="ddim").states[-1]
    torch.testing.assert_close(ours, solve(exact, denoiser.process, x, ends, solver="ddim").states[-1])


def test_edms_inner_network_is_preconditioned_here():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, time):
            return self.weight * 0 * x

    denoiser, sigma = edm(Inner(), sample_shape=[2], sigma_data=2.0), torch.tensor(3.0, dtype=torch.float64)
    x = torch.randn(4, 2)
    torch.testing.assert_close(denoiser(x, sigma), 4 / (9 + 4) * x)
    assert denoiser.process == VE(80.0)


def test_a_network_with_classes_gets_labels_and_its_null_label():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(4, 2)

        def forward(self, x, time, label):
            return self.rows(label)

    network = Labelled()
    denoiser = table(network, betas=BETAS, sample_shape=[2], num_classes=3, prediction="sample")
    x, t = torch.randn(2, 2), torch.tensor(5.0, dtype=torch.float64)
    assert torch.equal(denoiser(x, t, torch.tensor([0, 2])), network.rows.weight[[0, 2]])
    assert torch.equal(denoiser(x, t), network.rows.weight[[3, 3]])


def test_a_factory_that_returns_one_is_a_teacher(tmp_path, monkeypatch):
    (tmp_path / "my_flow.py").write_text(
        "import torch\nfrom limbeck.diffusion.models.factories import flow\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x, t):\n        return self.scale * x\n"
        "def teacher():\n    return flow(Net(), sample_shape=(3, 4, 4))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher = load_teacher("python:my_flow:teacher")
    assert (teacher.sample_shape, teacher.num_classes, teacher.process) == ((3, 4, 4), None, RectifiedFlow())
    assert teacher.model["process"] == {"name": "rectified_flow"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: flow(nn.Identity(), sample_shape=[2], data_at=2), "data_at 2: give the time"),
        (lambda: table(nn.Identity(), betas=BETAS, sample_shape=[2], prediction="eps"), "prediction 'eps': give"),
    ],
)
def test_mistakes_are_named(made, message):
    with pytest.raises(ValueError, match=message):
        made()
