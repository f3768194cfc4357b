"""Whole fits of dmd, vsd and sid by the command's own function."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.storage_schemas.dataset import latest_manifest, open_dataset, read_recipe
from limbeck.trainer.config import FitConfig
from limbeck.trainer.objectives import dmd
from limbeck.trainer.objectives.kind import Given
from limbeck.trainer.objectives.table import make_stages
from tests.trainer import conftest
from tests.trainer.test_fit import TINY, fit, go_on_past, killed_after


def words(store, out: Path, name: str, *more: str) -> list[str]:
    limits = ["--steps", "8", "--checkpoint-every", "2", "--log-every", "2", "--validate-every", "4"]
    return ["--data", store.uri, "--out", str(out), *TINY, *limits, "--objective.name", name, *map(str, more)]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dmd", ("--objective.gan", "0.1", "--objective.critic-steps", "3", "--critic.ema", "0.5")),
        ("vsd", ("--objective.student-steps", "4", "--told-guidance")),
        ("sid", ("--teacher.offload", "--gradient-checkpointing")),
    ],
)
def test_a_killed_fit_ends_as_one_that_was_not(make_store, tmp_path, monkeypatch, capsys, name, more):
    store, whole, cut = make_store(count=64), tmp_path / "whole", tmp_path / "cut"
    assert fit(*words(store, whole, name, *more)) == 0
    told = "the data holds guidance scale 1 alone, and this student takes scales: it learns of no other"
    assert (told in capsys.readouterr().err) == ("--told-guidance" in more)
    killed_after(monkeypatch, 2, words(store, cut, name, *more))
    assert fit(*words(store, cut, name, *more)) == 0
    ours, theirs = (checkpoint.load(out / "model") for out in (cut, whole))
    assert ours.weights == theirs.weights
    steps = 4 if name == "vsd" else 1
    assert (list(ours.grids), ours.about["sampling"]) == ([steps], "renoise")
    lines = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert "holdout_error" in lines[1]
    assert not (cut / "best").exists()  # an error that does not judge them makes none of them the best
    asked = {"loss", "grad_norm", "critic_loss", "critic_grad_norm"}
    # The student of dmd is updated in steps 3 and 6 alone.
    assert [asked <= line.keys() for line in lines] == ([False, True, True, False] if name == "dmd" else [True] * 4)


def test_what_a_teacher_or_images_cannot_be_is_refused_before_anything_begins(make_store, tmp_path, capsys):
    store = make_store(count=64)
    np.savez(tmp_path / "other.npz", images=np.full((4, 1, 3, 3), 9, np.uint8), labels=np.zeros(4, np.int64))
    for more, told in [
        (("vsd", "--critic.kind", "lora"), "critic.kind lora changes a network's weights, the teacher is a gaussian"),
        (("sid", "--objective.guidance", "2"), "objective.guidance 2.0 needs a teacher with classes"),
        (("dmd", "--objective.gan", "1", "--images", f"npz:{tmp_path / 'other.npz'}"), "the samples are [2]"),
    ]:
        assert fit(*words(store, tmp_path / "run", *more)) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Apart(nn.Module):
    """In place of LPIPS: how far means are apart."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.weight * (a - b).mean([1, 2, 3]).square()


def test_a_fit_goes_on_with_the_images_and_the_lpips_that_it_began_with(tmp_path, monkeypatch, capsys):
    gaussian = builtin_checkpoint("gaussian")
    teacher = replace(gaussian, model={**gaussian.model, "sample_shape": [1, 8, 8]})
    monkeypatch.setattr(conftest, "builtin_checkpoint", lambda name: teacher)
    store = conftest.write_store(tmp_path / "pairs", count=64)
    real, lpips = tmp_path / "real.npz", tmp_path / "lpips.pt"

    def save(grey: int, weight: float) -> tuple[bytes, bytes]:
        np.savez(real, images=np.full((4, 1, 8, 8), grey, np.uint8), labels=np.zeros(4, np.int64))
        torch.jit.script(Apart(weight)).save(lpips)
        return real.read_bytes(), lpips.read_bytes()

    def dmd(out: str, place: str) -> list[str]:
        checkpoint.save(teacher, tmp_path / place)
        more = ["--objective.gan", "0.1", "--images", f"npz:{real}", "--teacher.uri", tmp_path / place]
        return words(store, tmp_path / out, "dmd", *more, "--objective.distance", "lpips", "--objective.lpips", lpips)

    others, ours = save(100, 2.0), save(200, 1.0)

    assert fit(*dmd("whole", "teacher")) == 0
    killed_after(monkeypatch, 2, dmd("cut", "teacher"))
    capsys.readouterr()
    for path, other, own in zip((real, lpips), others, ours, strict=True):
        path.write_bytes(other)
        assert fit(*dmd("cut", "teacher")) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{path} has sha256" in line
        assert line.endswith("; bring back what it held, or choose another --out")
        path.write_bytes(own)
    assert fit(*dmd("cut", "the same teacher elsewhere")) == 0
    cut, whole = (checkpoint.load(tmp_path / out / "model") for out in ("cut", "whole"))
    assert cut.weights == whole.weights
    assert cut.about["reads"].keys() > {"images_digest", "lpips_sha256"}


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"teacher": {"weights_sha256": "0" * 64}}, id="teacher", marks=pytest.mark.faults),
        pytest.param({"guidance": {"scale": 3.0}}, id="guidance"),
    ],
)
def test_samples_of_another_score_are_not_gone_over_to(make_store, tmp_path, monkeypatch, capsys, changed):
    store, out = make_store(count=64, guidance=2.0), tmp_path / "vsd"
    more = "--teacher.uri", "python:tests.guided:GaussianClasses", "--follow-latest"
    killed_after(monkeypatch, 1, words(store, out, "vsd", *more))
    made = read_recipe(store, latest_manifest(store, "main").recipe_id).plain()
    go_on_past(store, (0, 64), **{name: made[name] | value for name, value in changed.items()})
    capsys.readouterr()
    assert fit(*words(store, out, "vsd", *more)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: manifest 2 is left aside, going on with 1: "
        "main now holds samples of another teacher or guidance scale; start another run on their score"
    ]


def test_a_new_window_of_the_same_teacher_is_gone_over_to(make_store, tmp_path, monkeypatch, capsys):
    store, out = make_store(count=64), tmp_path / "vsd"
    killed_after(monkeypatch, 1, words(store, out, "vsd", "--follow-latest"))
    made = read_recipe(store, latest_manifest(store, "main").recipe_id).plain()
    go_on_past(store, (64, 128), teacher=made["teacher"] | {"uri": "builtin:gaussian"})
    capsys.readouterr()
    assert fit(*words(store, out, "vsd", "--follow-latest")) == 0
    assert "on manifest 2, in place of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "options", "told"),
    [
        (
            {"name": "residual_mlp", "told_guidance": True},
            {"guidance": -1.0},
            "its teacher takes scales of 0 and more",
        ),
        (
            {"name": "diffusers_unet2d", "config": {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}},
            {"gan": 1.0},
            "the teacher's UNet has SkipDownBlock2D, whose inner features can't be had",
        ),
    ],
)
def test_a_teacher_that_can_not_be_asked_so_is_refused(make_store, network, options, told):
    dataset = open_dataset(make_store(count=64))
    model = {**dataset.recipe.teacher.model, "kind": "network", "num_classes": 3, "network": network}
    record = dataset.recipe.teacher.model_copy(update={"model": model})
    dataset = replace(dataset, recipe=dataset.recipe.model_copy(update={"teacher": record}))
    with pytest.raises(ValueError, match=told):
        make_stages(dmd.KIND, dmd.DmdOptions(**options), Given(dataset.recipe.sample_shape, 0, dataset))


def test_what_can_not_be_sharded_or_shared_is_refused():
    for options, told in [
        ({"objective": {"name": "dmd", "gan": 1.0}, "parallel": "fsdp"}, "can't be sharded; use --parallel ddp"),
        ({"objective": {"name": "vsd"}, "critic": {"kind": "lora"}, "parallel": "fsdp"}, "use copy, or --parallel ddp"),
        ({"objective": {"name": "vsd"}, "critic": {"kind": "lora"}, "told_guidance": True}, "take no guidance"),
    ]:
        with pytest.raises(ValueError, match=told):
            FitConfig(out="run", data="pairs", **options)


def test_their_learning_rate_is_lower():
    for name, lr, beta1 in (("dmd", 1e-4, 0.0), ("knowledge", 1e-3, 0.9)):
        config = FitConfig(out="run", data="pairs", objective={"name": name})
        assert (config.optimization.lr, config.optimization.beta1) == (lr, beta1)
    assert FitConfig(out="run", data="pairs", objective={"name": "sid"}, lr=0.5, beta1=0.5).optimization.lr == 0.5
