"""Whole fits of flow_map, ctm, consistency and reflow: refused, resumed, spread over ranks."""

import pytest
import torch

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.trainer.config import FitConfig
from limbeck.trainer.loop import Stepper
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.student import student_steps
from limbeck.trainer.networks.uncertainty import Uncertainty
from limbeck.trainer.planning.start import make_plan, start
from limbeck.trainer.ranks import alone
from limbeck.trainer.runs.place import Place
from tests.trainer.on_ranks import OBJECTIVES, config, global_batch, student
from tests.trainer.test_fit import TINY, fit, killed_after, refused, steady, weights
from tests.trainer.test_ranks import distance, on_ranks, reference, rounding

OPTIONS = {
    "flow_map": ["--objective.weighting", "learned"],
    "ctm": ["--objective.weighting", "learned", "--objective.target-ema", "0.9"],
    "consistency": ["--objective.distance", "pseudo_huber", "--objective.c", "0.1"],
    "reflow": ["--objective.schedule", "4", "2", "1"],
}


def words(name, store, out, *more) -> list[str]:
    options = ["--steps", "20", "--checkpoint-every", "7", "--log-every", "5", "--validate-every", "10"]
    return ["--data", store.uri, "--out", str(out), "--objective.name", name, *OPTIONS[name], *TINY, *options, *more]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cut_fit_goes_on_to_the_same_weights_and_serves_its_grids(make_store, tmp_path, monkeypatch, name):
    store, whole, cut = make_store(dtype="float16"), tmp_path / "whole", tmp_path / "cut"
    assert fit(*words(name, store, whole)) == 0
    killed_after(monkeypatch, 2, words(name, store, cut))
    assert fit(*words(name, store, cut)) == 0
    assert weights(cut / "model") == weights(whole / "model")
    assert steady(cut)[-1] == steady(whole)[-1]
    saved = checkpoint.load(whole / "model")
    assert saved.about["sampling"] == ("renoise" if name == "consistency" else "jump")
    assert saved.model["network"].get("second_time", False) == (name in ("flow_map", "ctm"))
    # Of 8 steps the states 0 2 4 6 8 are stored.
    assert student_steps(whole) == (1, 2, 4)
    first = 1.0 if name == "reflow" else 80.0
    assert [grid[0] for grid in saved.grids.values()] == [first] * 3


def test_a_student_with_a_second_time_begins_as_the_ddim_step_of_where_it_starts(make_store, tmp_path):
    spec = {
        "kind": "network", "sample_shape": [2], "num_classes": None, "process": {"name": "ve", "sigma_max": 80.0},
        "prediction": {"name": "edm", "sigma_data": 0.5}, "network": {"name": "residual_mlp", "width": 16, "depth": 1},
    }  # fmt: skip
    module = model_from_spec(spec)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint.save(Checkpoint(spec, pack(module)), tmp_path / "model")
    options = FitConfig(
        out=tmp_path / "out", data=make_store().uri, init=str(tmp_path / "model"), objective={"name": "ctm"}
    )
    _, denoiser = start(options, make_plan(options, alone(torch.device("cpu")), None, None), Place(options.out, None))
    begun, teacher = FlowMap(denoiser), FlowMap(module)
    assert begun.has_second_time
    x_s, (s, t) = 5 * torch.randn(9, 2), torch.tensor([5.0, 0.7], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(begun.jump(x_s, s, t), teacher.jump(x_s, s, t))


@pytest.mark.parametrize("name", OPTIONS)
def test_student_and_target_are_told_each_rows_label_and_guidance_in_every_call(name):
    network = {"name": "residual_mlp", "width": 8, "depth": 1, "second_time": True, "told_guidance": True}
    process = {"name": "rectified_flow" if name == "reflow" else "ve"}
    spec = {"kind": "network", "sample_shape": [1, 4, 4], "num_classes": 3, "process": process, "network": network}
    flow_maps = [FlowMap(model_from_spec(spec | {"prediction": {"name": "sample"}})) for _ in range(2)]
    heard: list[tuple[torch.Tensor, ...]] = []
    for flow_map in flow_maps:
        flow_map.denoiser.network.register_forward_pre_hook(lambda _, inputs: heard.append(inputs))
    batch = global_batch(0)
    batch.guidance.copy_(torch.linspace(1, 4, len(batch)))
    OBJECTIVES[name](Networks(flow_maps[0], flow_maps[1], weighting=Uncertainty(0)), batch)
    assert len(heard) == {"flow_map": 1, "ctm": 5, "consistency": 2, "reflow": 1}[name]
    for _, _, labels, _, guidance in heard:
        assert torch.equal(labels, torch.where(batch.condition < 0, 3, batch.condition))
        torch.testing.assert_close(guidance, batch.guidance.log1p().float())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_target_takes_no_gradients_and_follows_the_student(decay):
    fitted, options = student(0, second_time=True), config(objective={"name": "ctm", "target_ema": decay}, lr=0.1)
    stepper = Stepper(Networks(fitted, weighting=Uncertainty(0)), options, alone(torch.device("cpu")))
    for step in range(3):
        before = [weight.clone() for weight in stepper.networks.target.parameters()]
        stepper.step(OBJECTIVES["ctm"], global_batch(step), seed=0)
    assert not all(torch.equal(*pair) for pair in zip(before, fitted.parameters(), strict=True))
    share = min(decay, (1 + 2) / (10 + 2))  # it starts short
    for weight, was, current in zip(stepper.networks.target.parameters(), before, fitted.parameters(), strict=True):
        assert weight.grad is None
        torch.testing.assert_close(weight, share * was + (1 - share) * current)


@pytest.mark.parametrize("name", ["flow_map", "ctm", "consistency"])
def test_data_without_inner_states_is_refused_with_what_to_store(make_store, tmp_path, capsys, name):
    line = refused(capsys, *words(name, make_store(states=()), tmp_path / "out"))
    told = f"stores states 0 8, {name} learns from those between: generate with --states 2 4 6, or fit knowledge"
    assert told in line


@pytest.mark.parametrize(("name", "compared"), [("flow_map", "states at every noise level"), ("reflow", "velocities")])
def test_lpips_of_what_is_no_image_is_refused(make_store, tmp_path, capsys, name, compared):
    options = ["--objective.distance", "lpips", "--objective.lpips", "lpips.pt"]
    line = refused(capsys, *words(name, make_store(), tmp_path / "out"), *options)
    assert f"distance lpips compares images, {name} compares {compared}; choose another" in line


CASES = {
    "flow_map": {"second_time": True, "options": {"objective": {"name": "flow_map", "weighting": "learned"}}},
    "ctm": {"second_time": True, "options": {"objective": {"name": "ctm", "weighting": "learned"}, "micro_batch": 8}},
    "consistency": {"options": {"objective": {"name": "consistency"}}},
    "reflow": {"process": "rectified_flow", "options": {"objective": {"name": "reflow"}}},
}


@pytest.mark.faults
def test_two_ranks_fit_as_one_process_does(tmp_path):
    cases = {
        f"{way} {name}": {"objective": name, "sharded": way == "fsdp", **case}
        for name, case in CASES.items()
        for way in ("ddp", "fsdp")
    }
    told = on_ranks(tmp_path, 2, cases)
    for name, case in cases.items():
        found, want, tolerance = told[name], reference(case), 8 * rounding(case)
        assert found["alike"], name
        assert min(want["norms"]) > 0.05  # so that every step is clipped
        assert 0 < tolerance < 2e-4, (name, tolerance)
        assert distance(found, want) <= tolerance, (name, distance(found, want), tolerance)
