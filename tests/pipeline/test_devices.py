"""A device that this machine doesn't have is one line and exit code 2, whatever solves there."""

import pytest
import torch

WORKER = ["--teacher", "builtin:gaussian", "--runner", "local"]
SMALL = ["--count", 64, "--holdout", 0, "--samples-per-shard", 64, "--micro-batch", 32, "--solver.steps", 4]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("command", ["generate", "plan", "calibrate", "verify", "reproduce"])
def test_a_device_that_is_not_here_is_refused_in_one_line(pipeline, generate, tmp_path, command, device):
    words = {
        "generate": ["--store", tmp_path / "new", *WORKER, *SMALL],
        "plan": ["--store", tmp_path / "new", *WORKER, *SMALL],
        "calibrate": [*WORKER, "--count", 8, "--steps", 2],
        "verify": [tmp_path / "there", "--audit", 4],
        "reproduce": [tmp_path / "there", "--sample", 3],
    }[command]
    if command in ("verify", "reproduce"):
        generate(tmp_path / "there", count=64, holdout=0)
    code, out, err = pipeline(command, *words, "--device", device)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"limbeck: device {device}: ")
    assert err.endswith("; use auto or cpu\n")
    assert not (tmp_path / "new").exists()
