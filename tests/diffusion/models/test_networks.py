"""The networks: what they are told, their inner features, gradient checkpointing, and a UNet from scratch."""

import builtins
import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.models.activations import checkpoint_activations
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.networks import Affine, ResidualMLP
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.models.unet import unet_spec

UNET = unet_spec((1, 8, 8), width=8, depth=1, time_scale=250.0)
NETWORKS = {
    "residual_mlp": {"name": "residual_mlp", "width": 16, "depth": 3, "dropout": 0.5},
    "diffusers_unet2d": {**UNET, "dropout": 0.5},
    "affine": {"name": "affine"},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def model(name, **options) -> Denoiser:
    """Of random weights, told classes, a second time and guidance; not affine's classes, which it can't be told."""
    if name == "diffusers_unet2d":
        pytest.importorskip("diffusers")
    spec = {
        "kind": "network",
        "sample_shape": [1, 8, 8],
        "num_classes": None if name == "affine" else 3,
        "process": {"name": "ve", "sigma_max": 80.0},
        "prediction": {"name": "edm", "sigma_data": 0.5},
        "network": NETWORKS[name] | {"second_time": True, "told_guidance": True} | options,
    }
    torch.manual_seed(0)
    denoiser = model_from_spec(spec)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser


def asked(rows=4) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(rows, 1, 8, 8, generator=generator),
        "t": torch.tensor([80.0, 1.0, 0.1, 0.5], dtype=torch.float64),
        "condition": torch.tensor([0, 1, 2, 3]),
        "until": torch.tensor([0.0, 0.5, 0.1, 0.2], dtype=torch.float64),
        "guidance": torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64),
    }


@every_network
def test_features_are_what_the_last_layers_see(name):
    denoiser, seen = model(name).eval(), []
    network = denoiser.network
    if name == "residual_mlp":
        network.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    if name == "diffusers_unet2d":
        network.unet.mid_block.register_forward_hook(lambda _, inputs, h: seen.append(h.mean((2, 3))))
    if name == "affine":
        network.register_forward_hook(lambda _, inputs, output: seen.append(output.flatten(1)))
    denoiser.output(**asked())
    features = denoiser.features(**asked())
    assert features.shape == (4, network.num_features)
    assert torch.equal(features, seen[0])


@every_network
@pytest.mark.parametrize("number", ["t", "condition", "until", "guidance"])
def test_each_number_is_told_and_to_its_own_sample(name, number):
    if (name, number) == ("affine", "condition"):
        pytest.skip("affine knows no classes")
    denoiser, told = model(name).eval(), asked()
    if name == "affine":
        told["condition"] = None
    plain = denoiser(**told)
    other = told[number].clone()
    other[2] = {"t": 0.2, "condition": 1, "until": 0.0, "guidance": 1.0}[number]
    moved = (denoiser(**{**told, number: other}) - plain).abs().flatten(1).amax(1)
    assert moved[2] > 1e-4
    assert torch.equal(moved[[0, 1, 3]], torch.zeros(3))


@pytest.mark.parametrize("name", ["residual_mlp", "diffusers_unet2d"])
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(name):
    """With dropout: what is run again draws the same numbers again."""
    plain = model(name, **({"depth": 8} if name == "residual_mlp" else {})).train()
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    assert list(saving.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(saving)  # an average's copy runs its own blocks, not the first one's
    for parameter in saving.network.blocks[0].parameters():
        assert parameter not in set(copied.parameters())
    kept = [kept_numbers(denoiser) for denoiser in (plain, saving, copied)]
    assert kept[1] == kept[2] < kept[0] / 2
    for parameter, same, third in zip(*(d.parameters() for d in (plain, saving, copied)), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, same.grad)
        assert torch.equal(parameter.grad, third.grad)


def kept_numbers(denoiser) -> int:
    """Numbers that a forward pass keeps for its backward pass, which is run too; with what blocks are run from."""
    weights = {parameter.data_ptr() for parameter in denoiser.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.detach()
        return tensor

    def keep_inputs(_, *inputs):
        for tensor in filter(torch.is_tensor, tree_leaves(inputs)):
            keep(tensor)

    for block in denoiser.network.blocks:
        block.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = denoiser(**asked()).square().sum()
    total = sum(tensor.numel() for tensor in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize(
    ("shape", "width", "channels"),
    [
        ((3, 32, 32), 64, [64, 128, 128]),
        ((1, 28, 28), 64, [64, 128, 128]),
        ((1, 8, 8), 16, [16, 32]),
        ((1, 7, 9), 6, [6]),
    ],
)
def test_a_unet_spec_says_everything(shape, width, channels):
    pytest.importorskip("diffusers")
    spec = unet_spec(shape, width=width, depth=1, time_scale=250.0)
    assert spec["config"]["block_out_channels"] == channels
    denoiser = model_from_spec(
        {
            "kind": "network",
            "sample_shape": list(shape),
            "num_classes": 10,
            "process": {"name": "ve"},
            "prediction": {"name": "edm"},
            "network": spec,
        }
    )
    x_t, t = torch.randn(2, *shape), torch.tensor(3.0, dtype=torch.float64)
    # It starts at F = 0, so that x_0 = c_skip x_t.
    torch.testing.assert_close(denoiser(x_t, t, torch.tensor([0, 10])), 0.25 / 9.25 * x_t)


def test_a_unet_is_for_images():
    with pytest.raises(ValueError, match=r"needs images \[C, H, W\], the data has \[2\]; use residual_mlp"):
        unet_spec((2,), width=8, depth=1, time_scale=1.0)


def test_a_unet_without_its_package_is_one_line(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"pip install 'limbeck\[diffusers\]'"):
        model("diffusers_unet2d")


def test_a_widened_unet_is_its_teacher_bit_for_bit():
    denoiser = model("diffusers_unet2d", second_time=False, told_guidance=False, dropout=0.0)
    spec = {
        "kind": "network",
        "sample_shape": [1, 8, 8],
        "num_classes": 3,
        "process": {"name": "ve", "sigma_max": 80.0},
        "prediction": {"name": "edm", "sigma_data": 0.5},
        "network": {**UNET},
    }
    student = widened(Checkpoint(spec, pack(denoiser)), second_time=True, told_guidance=True).build()
    told = asked()
    plain = {name: told[name] for name in ("x_t", "t", "condition")}
    assert torch.equal(student(**told), denoiser.eval()(**plain))


def test_networks_of_before_have_the_same_weights_and_answers():
    """Options that are off draw nothing: a seed gives the weights that it always gave."""
    torch.manual_seed(0)
    network = ResidualMLP(sample_shape=(4,), num_classes=3, width=8, depth=1)
    assert "second_time" not in {name.split(".")[0] for name in network.state_dict()}
    assert network.enter.weight[0, 0].item() == pytest.approx(GOLDEN["residual_mlp"], abs=1e-6)
    torch.manual_seed(0)
    affine = Affine(sample_shape=(4,), num_classes=None)
    assert list(affine.state_dict()) == ["time.frequencies", "coefficients.weight", "coefficients.bias"]
    assert affine.time.frequencies[0].item() == pytest.approx(GOLDEN["affine"], abs=1e-6)


GOLDEN = {"residual_mlp": 0.08082520961761475, "affine": -1.1258398294448853}


def test_a_network_that_is_told_more_compiles_as_one_graph():
    torch._dynamo.reset()
    told = torch._dynamo.explain(model("residual_mlp").eval())(**asked())
    assert (told.graph_count, told.graph_break_count) == (1, 0)


@pytest.mark.parametrize("name", ["residual_mlp", "diffusers_unet2d"])
def test_half_precision_networks_are_told_times_in_full(name):
    """In bfloat16 a time of 1001 rounds to 1000; told in float32, its features differ."""
    denoiser = model(name).eval().to(torch.bfloat16)
    told = asked()
    close = {**told, "t": told["t"] * 1.002}
    times = []
    denoiser.network.register_forward_pre_hook(lambda _, inputs: times.append(inputs[1]))
    assert denoiser(**told).dtype == torch.float32
    denoiser(**close)
    assert times[0].dtype == torch.float32
    assert (times[0] != times[1]).all()
