"""Models survive the disk bit for bit, and what is wrong with them is told in one line."""

import json
from dataclasses import replace

import pytest
import torch

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.spec import model_from_spec, process_from_spec, process_spec
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.process import VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow

SPEC = {
    "kind": "network",
    "sample_shape": [1, 4, 4],
    "num_classes": 3,
    "process": {"name": "ve", "sigma_max": 80.0},
    "prediction": {"name": "edm", "sigma_data": 0.5},
    "network": {"name": "residual_mlp", "width": 16, "depth": 1},
}


def save_random(folder, dtype=torch.float32):
    torch.manual_seed(0)
    model = model_from_spec(SPEC)
    torch.nn.init.normal_(model.network.leave.weight)
    saved = checkpoint.Checkpoint(SPEC, checkpoint.pack(model, dtype=dtype), {1: (80.0, 0.0)}, {"note": "random"})
    checkpoint.save(saved, folder)
    return model.eval(), saved


def answer(model):
    x_t = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    return model(x_t, torch.tensor(3.0, dtype=torch.float64), torch.tensor([0, 2]))


def test_a_model_comes_back_bit_for_bit(tmp_path):
    model, saved = save_random(tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded == saved
    assert torch.equal(answer(loaded.build()), answer(model))


def test_half_precision_weights_are_read_as_float32(tmp_path):
    model, _ = save_random(tmp_path, dtype=torch.float16)
    built = checkpoint.load(tmp_path).build()
    assert next(built.parameters()).dtype == torch.float32
    torch.testing.assert_close(answer(built), answer(model), rtol=1e-2, atol=1e-2)


def test_changed_weights_are_refused(tmp_path):
    save_random(tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="fetch the model again"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("document", ["{}", "[]", '{"model": {}, "grids": [], "about": {}}'])
def test_somebody_elses_model_json_is_refused(tmp_path, document):
    save_random(tmp_path)
    (tmp_path / "model.json").write_text(document)
    with pytest.raises(ValueError, match="not one of ours"):
        checkpoint.load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder with a model\.json"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    "process", [LinearVP(0.2, 15.0), CosineVP(), VE(40.0), RectifiedFlow(), DiscreteVP((0.1, 0.2))]
)
def test_a_process_goes_through_json(process):
    assert process_from_spec(json.loads(json.dumps(process_spec(process)))) == process


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "oracle"}, "model kind 'oracle' is unknown; use one of network, gaussian, mixture"),
        ({"process": {"name": "vq"}}, "process 'vq' is unknown; use one of linear_vp"),
        ({"process": {"name": "ve", "beta": 1}}, "process ve has no field 'beta'; its fields are: sigma_max"),
        ({"network": {"name": "unet"}}, "network 'unet' is unknown"),
        (
            {"network": {"name": "residual_mlp", "heads": 8}},
            "network residual_mlp has no field .heads.; its fields are: bandwidth",
        ),
    ],
)
def test_a_wrong_spec_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        model_from_spec({**SPEC, **change})


def test_a_saved_student_is_a_teacher(tmp_path):
    model, saved = save_random(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert (teacher.sample_shape, teacher.num_classes, teacher.process) == ((1, 4, 4), 3, VE())
    assert teacher.weights_sha256 == saved.weights_sha256
    assert torch.equal(answer(teacher.denoiser), answer(model))


def test_a_student_without_labels_is_a_teacher_without_classes(tmp_path):
    _, saved = save_random(tmp_path)
    checkpoint.save(replace(saved, about={"labels": False}), tmp_path)
    assert load_teacher(str(tmp_path)).num_classes is None


def test_an_unknown_builtin_lists_what_there_is():
    with pytest.raises(ValueError, match=r"builtin:nothing is not shipped; use one of .*builtin:mixture"):
        load_teacher("builtin:nothing")


def test_a_factory_is_a_teacher(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(
        "from limbeck.diffusion.gaussian import GaussianTeacher\n"
        "from limbeck.diffusion.process import VE\n"
        "def make():\n"
        "    teacher = GaussianTeacher(VE(), mean=0.0, variance=1.0)\n"
        "    teacher.sample_shape = (2, 3)\n"
        "    return teacher\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    teacher = load_teacher("python:my_teacher:make")
    assert (teacher.sample_shape, teacher.num_classes) == ((2, 3), None)
    assert len(teacher.source_sha256) == 64
    with pytest.raises(ValueError, match="my_teacher has no 'build'"):
        load_teacher("python:my_teacher:build")
