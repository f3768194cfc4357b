"""Models that somebody else saved: what is no model of ours is told in one line, before memory or time goes into it."""

import hashlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.spec import model_from_spec
from tests.diffusion.models.test_checkpoint import SPEC, answer, save_random

UNET = {
    "sample_size": 4, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 8],
    "norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
}  # fmt: skip

KNOWN = {"uri": "x", "weights_sha256": "0", "grids": {}, "about": {}}


def unet(**changes: object) -> dict:
    return {"name": "diffusers_unet2d", "config": {**UNET, **changes}}


def put(folder: Path, document: object = None, *, weights: bytes | None = None, text: bytes | None = None) -> Path:
    """A saved model with another description, whose hash agrees, or with other weights."""
    save_random(folder)
    data = (folder / "model.safetensors").read_bytes() if weights is None else weights
    (folder / "model.safetensors").write_bytes(data)
    found = json.loads((folder / "model.json").read_text()) if document is None else document
    if isinstance(found, dict):
        found["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "model.json").write_bytes(json.dumps(found).encode() if text is None else text)
    return folder


def changed(path: str, value: object) -> dict:
    """What model.json says, but for one field."""
    document = json.loads(json.dumps(Checkpoint(SPEC, b"").document()))
    *outer, last = path.split(".")
    inner = document
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return document


def refused(folder: Path) -> str:
    """The one line by which a model is refused, in little time and memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r".") as told:
        checkpoint.load(folder).build()
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB
    line = str(told.value)
    assert "\n" not in line
    assert len(line) < 700
    assert (
        str(folder) in line
        or "can't be built" in line
        or "is unknown" in line
        or "has no field" in line
        or "give numbers" in line
    )
    return line


DESCRIPTIONS = {
    "a huge width": ("model.network.width", 10**7),
    "a width past int64": ("model.network.width", 10**30),
    "a negative width": ("model.network.width", -3),
    "no width": ("model.network.width", 0),
    "a width in words": ("model.network.width", "wide"),
    "a huge depth": ("model.network.depth", 10**8),
    "a depth that needs time": ("model.network.depth", 10**5),
    "a depth of half": ("model.network.depth", 0.5),
    "huge classes": ("model.num_classes", 2**31),
    "classes past int64": ("model.num_classes", 10**40),
    "no classes at all": ("model.num_classes", 0),
    "classes in words": ("model.num_classes", "10"),
    "a huge shape": ("model.sample_shape", [2**31, 2**31]),
    "a shape past int64": ("model.sample_shape", [10**30]),
    "an empty shape": ("model.sample_shape", []),
    "a shape in words": ("model.sample_shape", "1x8x8"),
    "another network": ("model.network.name", "transformer"),
    "a network of no name": ("model.network.name", ["residual_mlp"]),
    "an unknown field": ("model.network.heads", 8),
    "no network": ("model.network", None),
    "another kind": ("model.kind", "oracle"),
    "a kind that is a list": ("model.kind", ["network"]),
    "no process": ("model.process", 5),
    "another process": ("model.process", {"name": ["ve"]}),
    "a process in words": ("model.process.sigma_max", "much"),
    "no prediction": ("model.prediction", []),
    "another prediction": ("model.prediction", {"name": "edm", "sigma_data": "x"}),
    "no model": ("model", []),
    "about a number": ("about", 7),
    "grids in words": ("grids", {"x": ["y"]}),
    "a grid of words": ("grids", {"1": ["y"]}),
    "a grid of no list": ("grids", {"1": 5}),
    "scales of words": ("about.guidance_scales", ["x"]),
    "no scales": ("about.guidance_scales", []),
    "labels in words": ("about.labels", "no"),
    "an init of nothing": ("about.init", {}),
    "an init of an init of nothing": ("about.init", KNOWN | {"about": {"init": 5}}),
    "a unet of many layers": ("model.network", unet(layers_per_block=10**6)),
    "a unet of many blocks": ("model.network", unet(block_out_channels=[8] * 10**5)),
    "a wide unet": ("model.network", unet(block_out_channels=[2**20] * 2)),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_description_that_is_not_of_the_weights_is_refused(tmp_path, path, value):
    refused(put(tmp_path, changed(path, value)))


TEXTS = {
    "empty": b"",
    "cut": b'{"model": {',
    "deep": b"[" * 200_000,
    "deep in about": b'{"model": {}, "grids": {}, "weights_sha256": "", "about": {"a": ' + b"[" * 200_000,
    "NaN": b'{"model": {"kind": NaN}}',
    "infinite": b'{"model": {"kind": 1e999}}',
    "many digits": b'{"model": ' + b"9" * 10_000 + b"}",
    "bytes": b"\xff\xfe\x00",
    "a list": b"[]",
    "a null": b"null",
    "long": b" " * (17 << 20),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_description_is_refused(tmp_path, text):
    assert "model.json" in refused(put(tmp_path, text=text))


def stored(header: object, body: bytes = b"") -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + body


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


FOUR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
WEIGHTS = {
    "empty": b"",
    "short": b"abc",
    "words": b"x" * 99,
    "a header of 2**60": struct.pack("<Q", 2**60) + b"{}",
    "a header past the end": struct.pack("<Q", 99) + b"{}",
    "deep": stored(b"[" * 200_000),
    "a list": stored([]),
    "no tensors": stored({}),
    "more than there is": stored({"a": {**FOUR, "shape": [2**38], "data_offsets": [0, 2**40]}}),
    "less than there is": stored({"a": FOUR}, b"\0" * 99),
    "the same bytes twice": stored({"a": FOUR, "b": FOUR}, b"\0" * 16),
    "another size": stored({"a": {**FOUR, "shape": [5]}}, b"\0" * 16),
    "a negative size": stored({"a": {**FOUR, "shape": [-4]}}, b"\0" * 16),
    "no dtype": stored({"a": {**FOUR, "dtype": "F12"}}, b"\0" * 16),
    "no offsets": stored({"a": {"dtype": "F32", "shape": [4]}}, b"\0" * 16),
    "another's": safetensors.torch.save({"a": torch.zeros(4)}),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_none_are_refused(tmp_path, weights):
    assert "model.safetensors" in refused(put(tmp_path, weights=weights))


def test_pickled_weights_are_refused_and_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    refused(put(tmp_path / "model", weights=pickle.dumps(Touch(canary))))
    assert not canary.exists()


@pytest.mark.parametrize("at", [0, 7, 99, -1])
def test_cut_weights_are_refused(tmp_path, at):
    save_random(tmp_path)
    assert "fetch the model again" in refused(put(tmp_path, weights=(tmp_path / "model.safetensors").read_bytes()[:at]))


def renamed(folder: Path, name_of) -> Path:
    save_random(folder)
    held = safetensors.torch.load_file(folder / "model.safetensors")
    return put(folder, weights=safetensors.torch.save({name_of(name): tensor for name, tensor in held.items()}))


@pytest.mark.parametrize(
    "name_of",
    [
        lambda name: f"module.{name}",
        lambda name: name.replace("network.", "network._orig_mod.", 1),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
    ],
)
def test_prefixes_of_ddp_and_compile_are_left_out(tmp_path, name_of):
    model, _ = save_random(tmp_path)
    assert torch.equal(answer(checkpoint.load(renamed(tmp_path, name_of)).build()), answer(model))


@pytest.mark.parametrize(
    ("name_of", "told"),
    [
        (lambda name: f"ema.{name}", r"\(its names begin with ema\.\)"),
        (lambda name: f"module.{name}" if "enter" in name else f"student.{name}", r"hold module\.\)"),
    ],
)
def test_other_prefixes_are_told(tmp_path, name_of, told):
    with pytest.raises(ValueError, match=told):
        checkpoint.load(renamed(tmp_path, name_of)).build()


def test_a_prefix_that_hides_two_tensors_is_refused(tmp_path):
    save_random(tmp_path)
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    both = {**held, **{f"module.{name}": tensor.clone() for name, tensor in held.items()}}
    assert "no part of its description" in refused(put(tmp_path, weights=safetensors.torch.save(both)))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_pipe_is_no_file_of_a_model(tmp_path, name):
    save_random(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_file_with_a_hole_of_a_tebibyte_is_refused(tmp_path, name):
    save_random(tmp_path)
    os.truncate(tmp_path / name, 1 << 40)
    assert name in refused(tmp_path)


def test_weights_for_which_there_is_no_memory_are_refused(tmp_path):
    size = 1 << 40
    put(tmp_path, weights=stored({"a": {**FOUR, "shape": [size // 4], "data_offsets": [0, size]}}))
    os.truncate(tmp_path / "model.safetensors", size + (tmp_path / "model.safetensors").stat().st_size)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, limits[1]))
    try:
        assert "for which there is no memory" in refused(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_weights_of_another_kind_of_number_are_refused(tmp_path):
    save_random(tmp_path)
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    whole = {name: tensor.to(torch.int32) for name, tensor in held.items()}
    refused(put(tmp_path, weights=safetensors.torch.save(whole)))


def test_holding_a_description_against_the_weights_draws_no_numbers():
    saved = Checkpoint(SPEC, checkpoint.pack(model_from_spec(SPEC)))
    torch.manual_seed(3)
    saved.build()
    after = torch.rand(1)
    torch.manual_seed(3)
    model_from_spec(SPEC)
    assert torch.equal(after, torch.rand(1))


def test_holding_a_description_against_the_weights_imports_no_compiler(tmp_path):
    save_random(tmp_path)
    code = f"import sys; from limbeck.diffusion.models.checkpoint import load; load({str(tmp_path)!r}).build()"
    words = [sys.executable, "-c", f"{code}; print(*sys.modules)"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert "limbeck.diffusion.models.networks" in told
    assert not {"torch._dynamo", "sympy"} & set(told)
