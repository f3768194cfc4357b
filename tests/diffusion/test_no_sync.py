"""Between the first call of the network and the last one, nothing waits for a device and nothing is copied to one."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.diffusion.denoiser import Denoiser, Guided
from limbeck.diffusion.gaussian import GaussianTeacher, MixtureTeacher
from limbeck.diffusion.grids import karras
from limbeck.diffusion.models.networks import ResidualMLP
from limbeck.diffusion.prediction import PREDICTIONS
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from limbeck.diffusion.solvers import SOLVERS, solve

TABLE = tuple(torch.linspace(1e-3, 0.2, 50, dtype=torch.float64).tolist())
PROCESSES = [LinearVP(), CosineVP(), VE(), RectifiedFlow(), DiscreteVP(TABLE)]
WAITS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"}

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


class Crossings(TorchDispatchMode):
    """Counts what would wait for the device: reading a value of it, and copies from the CPU to it or back."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, answer) if isinstance(value, torch.Tensor)]
        if str(function) in WAITS and tensors[0].device.type == self.device:
            self.found[str(function)] += 1
        if "copy" in str(function) and len({tensor.device.type for tensor in tensors}) > 1:
            self.found[str(function)] += 1
        return answer


def network_of(process, prediction, device):
    torch.manual_seed(0)
    network = ResidualMLP(sample_shape=(3,), num_classes=4, width=16, depth=1)
    return Denoiser(network, process, PREDICTIONS[prediction](), 4).to(device).requires_grad_(False)


def crossings(denoise, process, solver, device, *, steps=4):
    times = karras(process, steps)
    x_T, condition = torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with torch.no_grad(), Crossings(device) as watch:
        solution = solve(denoise, process, x_T, times, solver=solver, condition=condition)
    assert solution.states.device.type == device
    return watch.found


@every_solver
@every_process
def test_one_copy_of_all_times_is_all_that_goes_to_a_device(solver, process):
    """A meta tensor has no values: reading one raises, and what it would be copied from is seen."""
    scales = torch.ones(2, dtype=torch.float64, device="meta")
    denoise = Guided(network_of(process, "v_prediction", "meta"), scales)
    crossings(denoise, process, solver, "meta")  # a table of betas crosses once in a process's life
    assert crossings(denoise, process, solver, "meta") == {"aten._to_copy.default": 1}


@every_prediction
def test_no_prediction_reads_a_value(prediction):
    process = LinearVP()
    found = crossings(network_of(process, prediction, "meta"), process, "heun", "meta")
    assert found == {"aten._to_copy.default": 1}


def test_the_watch_sees_a_copy_in_the_loop():
    def denoise(x_t, t, condition):
        return x_t * torch.ones(()).to(x_t)

    assert crossings(denoise, VE(), "ddim", "meta")["aten._to_copy.default"] == 5


def test_closed_forms_read_no_value():
    process = VE()
    for teacher in (
        GaussianTeacher(process, mean=0.5, variance=0.25),
        MixtureTeacher(process, weights=(0.5, 0.5), means=(-1, 1), variances=(0.1, 0.1)),
    ):
        crossings(teacher, process, "heun", "meta")
        assert crossings(teacher, process, "heun", "meta") == {"aten._to_copy.default": 1}


@every_process
def test_a_compiled_denoiser_is_one_graph_that_makes_no_tensor_of_its_own(process):
    """torch runs nothing as a CUDA graph that breaks off, or into which numbers come from the CPU."""
    torch._dynamo.reset()
    denoiser = network_of(process, "v_prediction", "cpu")
    arguments = torch.ones(2, 3), torch.tensor(0.5, dtype=torch.float64) * process.T, torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        told = torch._dynamo.explain(denoiser)(*arguments)
        assert (told.graph_count, told.graph_break_count) == (1, 0)
        assert torch.tensor not in [node.target for node in told.graphs[0].graph.nodes]
        compiled = torch.compile(denoiser, backend="eager", dynamic=False)
        for part in (1.0, 0.3):
            x_t, t, condition = arguments[0], part * arguments[1], arguments[2]
            assert torch.equal(compiled(x_t, t, condition), denoiser(x_t, t, condition))


@pytest.mark.gpu
@every_solver
@every_process
def test_a_gpu_is_never_waited_for(solver, process):
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64, device="cuda")
    denoise = Guided(network_of(process, "edm", "cuda"), scales)

    def watched(x_t, t, condition):
        torch.cuda.set_sync_debug_mode("error")
        return denoise(x_t, t, condition)

    watched.nfe_per_call = denoise.nfe_per_call
    crossings(denoise, process, solver, "cuda")
    try:
        crossings(watched, process, solver, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
