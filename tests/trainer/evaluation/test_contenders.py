"""Students on stored pairs: told each pair's own guidance, sampled their own way, from noise of their own scale."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from limbeck.diffusion import noise
from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import ManifestMismatch
from limbeck.trainer.evaluation.contenders import student
from limbeck.trainer.evaluation.holdout import read_pairs

CPU = torch.device("cpu")
GRIDS = {1: (80.0, 0.0), 2: (80.0, 1.5, 0.0)}
MEAN, VARIANCE = 0.5, 0.25


@pytest.fixture
def dataset(make_store):
    return open_dataset(make_store(count=64))


def told_student() -> Checkpoint:
    """Random weights, told a second time and guidance, for the pairs of the closed-form Gaussian."""
    spec = {**builtin_checkpoint("gaussian").model, "kind": "network", "prediction": {"name": "edm"}}
    spec = {key: value for key, value in spec.items() if key not in ("mean", "variance")}
    spec["network"] = {"name": "residual_mlp", "width": 16, "depth": 1}
    torch.manual_seed(0)
    saved = widened(Checkpoint(spec, pack(model_from_spec(spec)), GRIDS), second_time=True, told_guidance=True)
    module = saved.build()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return replace(saved, weights=pack(module))


def test_each_pair_tells_its_own_guidance(dataset, tmp_path):
    saved = told_student()
    checkpoint.save(saved, tmp_path / "run")
    pairs = read_pairs(dataset, "holdout", 32, at_most=32)
    pairs = replace(pairs, guidance=torch.linspace(0, 7, 32).double())
    outputs = student(tmp_path / "run", 2, dataset.recipe, device=CPU).outputs(pairs, batch=16, device=CPU)
    with torch.no_grad():
        times = torch.tensor(GRIDS[2], dtype=torch.float64)
        flow_map = FlowMap(saved.build())
        expected = flow_map.sample(pairs.noise.float(), times, guidance=pairs.guidance)
        unguided = flow_map.sample(pairs.noise.float(), times)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert (outputs - unguided).abs().max() > 1e-2


def test_noise_anew_belongs_to_the_pairs_ids(dataset, tmp_path):
    """However the pairs are cut, and of the seed that the recipe has."""
    saved = replace(told_student(), about={"sampling": "renoise"})
    checkpoint.save(saved, tmp_path / "run")
    pairs = read_pairs(dataset, "holdout", 32, at_most=32)
    contender = student(tmp_path / "run", 2, dataset.recipe, device=CPU)
    whole, cut = (contender.outputs(pairs, batch=batch, device=CPU) for batch in (32, 8))
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-5)
    seed = dataset.recipe.noise.seed
    anew = torch.from_numpy(noise.standard_normal(seed, "holdout", np.arange(32), (2,), index=1)).float()
    with torch.no_grad():
        times = torch.tensor(GRIDS[2], dtype=torch.float64)
        expected = FlowMap(saved.build()).renoise(pairs.noise.float(), times, noises=lambda _: anew)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    jumps = student(tmp_path / "run", 2, dataset.recipe, device=CPU, way="jump").outputs(pairs, batch=32, device=CPU)
    assert (jumps - whole).abs().max() > 1e-2


def test_a_student_of_another_process_starts_from_the_same_noise_at_its_own_scale(dataset, tmp_path):
    """The rectified flow of N(m, v), in 200 Euler steps, ends at m + sqrt(v) x_T/80; each stored output is near it."""
    model = {**builtin_checkpoint("gaussian").model, "process": {"name": "rectified_flow"}}
    grids = {200: tuple(np.linspace(1.0, 0.0, 201).tolist())}
    checkpoint.save(Checkpoint(model, b"", grids, {"from_noise": "scaled"}), tmp_path / "flow")
    pairs = read_pairs(dataset, "holdout", 64, at_most=64)
    outputs = student(tmp_path / "flow", 200, dataset.recipe, device=CPU).outputs(pairs, batch=16, device=CPU)
    torch.testing.assert_close(outputs, MEAN + VARIANCE**0.5 * pairs.noise.float() / 80, rtol=0, atol=0.02)
    assert (outputs - pairs.output).square().mean() < 1e-3
    checkpoint.save(Checkpoint(model, b"", grids), tmp_path / "flow")
    with pytest.raises(ManifestMismatch, match="has process RectifiedFlow"):
        student(tmp_path / "flow", 200, dataset.recipe, device=CPU)
