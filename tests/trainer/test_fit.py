"""Whole runs by the command's own function, small ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.teachers import builtin_checkpoint
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.commit import put_commit
from limbeck.storage_schemas.dataset import (
    latest_manifest,
    open_dataset,
    put_recipe,
    read_recipe,
    read_shard_table,
    seal,
)
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.networks.student import find_student, student_steps
from limbeck.trainer.planning.start import make_plan
from limbeck.trainer.ranks import Ranks, alone
from limbeck.trainer.runs.checkpoints import Checkpoints
from limbeck.trainer.runs.record import only_fit
from tests.trainer.conftest import make_commit

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "--init",
    "scratch",
    "--network.width",
    "16",
    "--network.depth",
    "1",
    "--warmup",
    "2",
    "--batch-size",
    "32",
    "--threads",
    "1",
]


MEASURED = ("samples_per_s", "data_wait", "first_batch_s", "memory_mib")


def fit(*arguments: str) -> int:
    return main(COMMANDS, ["fit", *map(str, arguments)])


def knowledge(store: Store, out: Path, *more: str) -> list[str]:
    return ["--data", store.uri, "--out", str(out), *TINY, "--steps", "30", "--objective.name", "knowledge", *more]


def progressive(store: Store, out: Path, *more: str) -> list[str]:
    options = ["--objective.name", "progressive", "--objective.schedule", "4", "2", "1", "--steps", "20"]
    return ["--data", store.uri, "--out", str(out), *TINY, *options, "--network.dropout", "0.2", *more]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steady(out: Path) -> list[dict]:
    """Metrics without what depends on the machine and its clock."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in metrics(out)]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert fit(*arguments) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_knowledge_reaches_the_exact_flow(make_store, tmp_path):
    store, out = make_store(count=1024, holdout=256, samples_per_shard=256), tmp_path / "kd"
    options = ["--steps", "600", "--batch-size", "128", "--lr", "5e-3", "--ema", "0.98", "--network.width", "32"]
    assert fit(*knowledge(store, out), *options) == 0
    student = FlowMap(find_student(out, 1).build())
    teacher = builtin_checkpoint("gaussian").build()
    times = torch.tensor(find_student(out, 1).grids[1], dtype=torch.float64)
    x_T = 80 * torch.randn(512, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        error = student.sample(x_T.float(), times) - teacher.flow_map(x_T, times[0], times[1])
    # The flow is affine, so the network can say it; the output's variance is 0.25.
    assert error.square().mean().item() < 0.01 * 0.25
    last = metrics(out)[-1]
    assert last["step"] == 600
    assert last["holdout_error"] < 0.01 * 0.25
    assert last["lr"] == 0.0
    assert Store.open(store.uri).list("pins") == []
    assert checkpoint.load(out / "model").about["labels"] is False


def test_progressive_serves_each_stage(make_store, tmp_path):
    store, out = make_store(), tmp_path / "pd"
    assert fit(*progressive(store, out, "--log-every", "20")) == 0
    assert student_steps(out) == (1, 2, 4)
    times = find_student(out, 4).grids[4]
    assert find_student(out, 2).grids[2] == times[::2]
    assert find_student(out, 1).grids[1] == (times[0], 0.0)
    assert weights(out / "model") == weights(out / "stages" / "1-step")
    assert [line["stage"] for line in metrics(out)] == ["4-step", "2-step", "1-step"]
    assert [line["step"] for line in metrics(out)] == [20, 40, 60]


def test_a_schedule_that_the_states_cannot_serve_names_the_states(make_store, tmp_path, capsys):
    line = refused(capsys, *progressive(make_store(states=(4,)), tmp_path / "pd"))
    assert "stores states 0 4 8, this schedule needs also 2 6: generate with --states 2 4 6" in line
    assert not (tmp_path / "pd").exists()


def test_storage_too_coarse_for_a_stage_is_told(make_store, tmp_path, capsys):
    store = make_store(dtype="bfloat16", steps=64, states=tuple(range(1, 64)))
    options = ["--objective.schedule", "64", "32", "--steps", "3", "--warmup", "0"]
    assert "generate with --dtype float32" in refused(capsys, *progressive(store, tmp_path / "a"), *options)
    options[1:3] = ["16", "8"]
    assert fit(*progressive(store, tmp_path / "b"), *options) == 0
    assert "bfloat16 storage puts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--steps", "7"], ["--objective.c", "1"], ["--autocast", "float16"], ["--device", "cuda:9"]]
)
def test_refusals_are_one_line(make_store, tmp_path, capsys, options):
    store, out = make_store(), tmp_path / "kd"
    if options[0] == "--steps":
        assert fit(*knowledge(store, out)) == 0
        capsys.readouterr()
    arguments = knowledge(store, out, "--batch-size", "32", *options)
    assert refused(capsys, *arguments)


IMAGES = {"data": None, "images": "sklearn:digits", "init": "scratch"}


def test_impossible_configs_are_refused():
    def config(**options):
        return FitConfig(**{"out": "run", "data": "pairs", **options})

    for options, told in [
        ({"micro_batch": 100, "batch_size": 256}, "does not divide"),
        ({"steps": 10, "warmup": 10}, "leaves none"),
        ({"images": "sklearn:digits"}, "leave --images out"),
        ({"network": {"width": 8}}, "has its own"),
        ({"objective": {"name": "progressive", "distance": "l1"}}, "belongs to knowledge"),
        ({"objective": {"name": "progressive", "schedule": (8, 3)}}, "does not halve"),
        ({"objective": {"name": "denoising"}}, "needs --images"),
        ({"process": "ve"}, "has its teacher's process"),
        ({"objective": {"name": "vsd", "regression": 1.0}}, "belongs to dmd"),
        ({"objective": {"name": "flow_map", "distance": "pseudo_huber"}}, "pseudo_huber needs its width"),
        ({"objective": {"name": "knowledge", "lpips": "lpips.pt"}}, "lpips lpips.pt belongs to distance lpips"),
        ({"objective": {"name": "reflow", "weighting": "snr"}}, "use uniform or learned"),
        ({"init": "scratch", "network": {"name": "affine", "dropout": 0.1}}, "belongs to residual_mlp, unet"),
        ({"objective": {"name": "sid", "t_range": (0.9, 0.1)}}, "two shares in .0, 1. that ascend"),
        ({"objective": {"name": "sid", "guidance": float("nan")}}, "should be a finite number"),
        ({"objective": {"name": "dmd", "guidance": float("inf")}}, "should be a finite number"),
        ({"critic": {"lr": 1e-3}}, "knowledge has none"),
        (
            {"objective": {"name": "dmd"}, "critic": {"kind": "lora"}, "teacher": {"offload": True}},
            "shares the teacher",
        ),
        ({"objective": {"name": "dmd"}, "images": "sklearn:digits"}, "leave --images out"),
        ({"nonsense": 1}, "Extra inputs"),
        ({"lanes": 3, "batch_size": 256}, "does not divide batch_size 256"),
        ({"follow_latest": True, "manifest": 2}, "does not stay with manifest 2"),
        ({**IMAGES, "verify": "never", "objective": {"name": "denoising"}}, "reads images, no store"),
        ({**IMAGES, "process": "linear_vp", "objective": {"name": "denoising", "p_mean": -2.0}}, "belongs to ve"),
    ]:
        with pytest.raises(ValueError, match=told):
            config(**options)


def test_defaults_follow_the_objective():
    few = FitConfig(out="run", data="pairs", objective={"name": "progressive"})
    assert (few.student.init, few.optimization.decay, few.optimization.ema) == ("teacher", "linear", 0.0)
    assert few.objective.schedule == (8, 4, 2, 1)
    one = FitConfig(out="run", data="pairs")
    assert (one.student.init, one.optimization.decay, one.optimization.ema) == ("teacher", "cosine", 0.999)
    assert one.objective.distance == "l2"
    matching = FitConfig(out="run", data="pairs", images="sklearn:digits", objective={"name": "dmd", "gan": 0.1})
    assert (matching.optimization.beta1, matching.objective.regression, matching.objective.critic_steps) == (
        0.0,
        0.25,
        1,
    )
    assert FitConfig(out="run", data="pairs", objective={"name": "reflow"}).student.init == "scratch"
    real = FitConfig(out="run", **{**IMAGES, "objective": {"name": "denoising"}})
    assert (real.student.process, real.objective.p_mean, real.objective.p_std) == ("ve", -1.2, 1.2)
    other = FitConfig(out="run", **{**IMAGES, "process": "linear_vp", "objective": {"name": "denoising"}})
    assert other.objective.p_mean is None
    for config in (few, one, matching, real, other):
        assert FitConfig(**config.model_dump()) == config


class Stopped(Exception):
    pass


def stop_now() -> None:
    raise Stopped


def stop_after(monkeypatch, saves: int, stop=stop_now) -> None:
    """The process dies, or is told to end, right after its n-th checkpoint."""
    save, count = Checkpoints.save, iter(range(saves))

    def dying(*arguments, **options):
        save(*arguments, **options)
        if next(count, None) == saves - 1:
            stop()

    monkeypatch.setattr(Checkpoints, "save", dying)


def test_resume_at_any_checkpoint_is_bit_identical(make_store, tmp_path, monkeypatch):
    store, whole = make_store(dtype="float16"), tmp_path / "whole"
    options = ["--checkpoint-every", "7", "--log-every", "5", "--validate-every", "10", "--ema", "0.9"]
    assert fit(*progressive(store, whole, *options)) == 0
    for saves in (1, 4, 6):
        cut = tmp_path / f"cut after {saves}"
        killed_after(monkeypatch, saves, progressive(store, cut, *options))
        assert fit(*progressive(store, cut, *options)) == 0
        for folder in ("model", "stages/4-step", "stages/2-step", "stages/1-step"):
            assert weights(cut / folder) == weights(whole / folder)
        assert [line["step"] for line in metrics(cut)] == [line["step"] for line in metrics(whole)]
        # A mean over steps that a restart interrupted starts anew; every other figure is the same.
        assert steady(cut)[-1] == steady(whole)[-1]


def run_command(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "limbeck.trainer", "fit", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert condition()


@pytest.mark.faults
def test_a_killed_process_goes_on_to_the_same_weights(make_store, tmp_path):
    store, out = make_store(dtype="float16"), tmp_path / "cut"
    options = ["--steps", "80", "--checkpoint-every", "10"]
    assert fit(*progressive(store, tmp_path / "whole", *options)) == 0
    process = run_command(progressive(store, out, *options))
    wait_for(lambda: any((out / "checkpoints").glob("step-000001*")), process)
    process.kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, told
    assert not (out / "model").exists()
    assert fit(*progressive(store, out, *options)) == 0
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")


def test_told_to_end_a_fit_saves_after_the_step_and_goes_on(make_store, tmp_path, monkeypatch, capsys):
    store, out = make_store(), tmp_path / "cut"
    assert fit(*progressive(store, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert fit(*progressive(store, out, "--checkpoint-every", "7")) == 143
    assert "saved on a signal; the same command goes on" in capsys.readouterr().err
    assert not (out / "model").exists()
    assert fit(*progressive(store, out)) == 0
    assert "going on from step 8 of 60" in capsys.readouterr().err
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")


def test_starting_anew_is_refused_where_torchrun_would_repeat_it(make_store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    told = refused(capsys, *knowledge(make_store(), tmp_path / "kd", "--no-resume"))
    assert "--no-resume with --max-restarts=3 would start anew each time" in told


def test_a_finished_run_does_nothing_and_no_resume_starts_anew(make_store, tmp_path, capsys):
    store, out = make_store(), tmp_path / "kd"
    assert fit(*knowledge(store, out)) == 0
    before = weights(out / "model")
    (out / "notes.txt").write_text("mine")
    assert fit(*knowledge(store, out)) == 0
    assert weights(out / "model") == before
    assert fit(*knowledge(store, out, "--seed", "1", "--no-resume")) == 0
    assert weights(out / "model") != before
    assert (out / "notes.txt").read_text() == "mine"


def test_a_refused_start_leaves_the_run_before_as_it_was(make_store, tmp_path, capsys):
    store, out = make_store(), tmp_path / "kd"
    assert fit(*knowledge(store, out)) == 0
    capsys.readouterr()
    before = sorted(out.rglob("*"))
    refused(capsys, *knowledge(store, out, "--no-resume", "--manifest", "9"))
    refused(capsys, *knowledge(store, out, "--no-resume", "--device", "toaster"))
    assert sorted(out.rglob("*")) == before


def test_a_second_fit_in_the_same_folder_is_refused(make_store, tmp_path, capsys):
    store, out = make_store(), tmp_path / "run"
    with only_fit(out):
        assert "another fit is at work in" in refused(capsys, *knowledge(store, out))
    assert fit(*knowledge(store, out)) == 0


def test_a_run_that_diverges_ends_in_one_line_and_saves_no_numbers_that_are_none(make_store, tmp_path, capsys):
    out = tmp_path / "kd"
    line = refused(capsys, *knowledge(make_store(), out, "--lr", "1e30", "--checkpoint-every", "4"))
    assert "has diverged by step" in line
    assert not (out / "model").exists()
    assert list((out / "checkpoints").glob("step-*")) == []


def test_two_that_begin_in_one_folder_at_once_are_not_mixed(make_store, tmp_path, capsys, monkeypatch):
    store, out = make_store(), tmp_path / "kd"

    def overtaken(*arguments):
        monkeypatch.undo()
        assert fit(*knowledge(store, out)) == 0
        return make_plan(*arguments)

    monkeypatch.setattr("limbeck.trainer.fit.make_plan", overtaken)
    assert fit(*knowledge(store, out, "--seed", "1")) == 2
    assert "another fit has begun in" in capsys.readouterr().err
    assert fit(*knowledge(store, out)) == 0


@pytest.mark.parametrize("more", [[], ["--no-resume"]])
def test_checkpoints_of_who_knows_which_run_are_refused(make_store, tmp_path, capsys, more):
    store, out = make_store(), tmp_path / "kd"
    assert fit(*knowledge(store, out)) == 0
    capsys.readouterr()
    (out / "run.json").unlink()
    line = refused(capsys, *knowledge(store, out, *more))
    assert "holds checkpoints of a run without its run.json; move them, or choose another" in line


def test_every_rank_reads_the_manifest_that_the_first_one_found(make_store):
    class Second(Ranks):
        def broadcast(self, value):
            assert value is None
            return 1

    store, second = make_store(), Second(1, 2, 1, torch.device("cpu"))
    go_on_past(store, (64, 320))
    config = FitConfig(out="run", data=store.uri, init="scratch")
    assert make_plan(config, alone(second.device), None, None).reads["manifest"] == 2
    assert make_plan(config, second, None, None).reads["manifest"] == 1


def test_starting_again_leaves_one_pin(make_store, tmp_path, monkeypatch):
    store, out = make_store(), tmp_path / "kd"
    for _ in range(2):  # killed before the first checkpoint
        with monkeypatch.context() as patch:
            patch.setattr("limbeck.trainer.fit.Stepper.step", lambda *_, **__: stop_now())
            with pytest.raises(Stopped):
                fit(*knowledge(store, out))
        assert len(store.list("pins")) == 1
    assert fit(*knowledge(store, out, "--no-resume", "--seed", "1")) == 0
    assert store.list("pins") == []


def test_a_run_keeps_its_manifest_when_a_newer_one_is_sealed(make_store, tmp_path, monkeypatch):
    store, out = make_store(), tmp_path / "kd"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            fit(*knowledge(store, out, "--checkpoint-every", "10"))
    parent = latest_manifest(store, "main")
    draft = ManifestDraft(
        dataset="main", parent=parent, writer="w", recipe_id=parent.recipe_id, layout=parent.layout,
        window=Window(train=(64, 256), holdout=(0, 64)),
    )  # fmt: skip
    seal(store, draft, read_shard_table(store, parent))
    assert fit(*knowledge(store, out, "--checkpoint-every", "10")) == 0
    assert checkpoint.load(out / "model").about["reads"]["manifest"] == 1


def test_a_read_only_store_is_said_in_a_line(make_store, tmp_path, capsys, monkeypatch):
    from limbeck.storage_schemas.errors import StoreError

    def refuse(self, path, data):
        if path.startswith("pins/"):
            raise StoreError("read-only")
        write(self, path, data)

    store, write = make_store(), Store.write
    monkeypatch.setattr(Store, "write", refuse)
    assert fit(*knowledge(store, tmp_path / "kd")) == 0
    assert "manifest 1 is not pinned (read-only)" in capsys.readouterr().err


def test_a_pin_stands_while_a_run_is_under_way(make_store, tmp_path, monkeypatch):
    store = make_store()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            fit(*knowledge(store, tmp_path / "kd"))
    (name,) = store.list("pins")
    pin = json.loads(store.read(f"pins/{name}"))
    assert (pin["dataset"], pin["number"]) == ("main", 1)
    assert name.startswith("kd-")


def go_on_past(store: Store, window: tuple[int, int], **recipe) -> None:
    """Seal a manifest whose train window is another."""
    parent = latest_manifest(store, "main")
    made = read_recipe(store, parent.recipe_id)
    if recipe:
        made = Recipe(**made.plain() | recipe)
        put_recipe(store, made)
    sealed = Window(train=window, holdout=parent.window.holdout)
    tasks = sealed.tasks(parent.layout.samples_per_shard)
    commits = [put_commit(store, make_commit(store, made, parent.layout, task, ())) for task in tasks]
    draft = ManifestDraft(
        dataset="main", parent=parent, writer="w", recipe_id=made.id, layout=parent.layout, window=sealed
    )
    seal(store, draft, ShardTable.of([Shard.of(commit) for commit in commits]))


def pins(store: Store) -> list[int]:
    return sorted(json.loads(store.read(f"pins/{name}"))["number"] for name in store.list("pins"))


def killed_after(monkeypatch, saves: int, arguments: list[str]) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(Stopped):
            fit(*arguments)


def test_a_run_that_follows_goes_over_to_the_newest_manifest_at_an_epoch(make_store, tmp_path, monkeypatch, capsys):
    store, whole, cut = make_store(count=250), tmp_path / "whole", tmp_path / "cut"
    options = ["--checkpoint-every", "10", "--log-every", "2", "--batch-size", "24", "--follow-latest"]
    options += ["--objective.distance", "pseudo_huber", "--objective.c", "0.5"]  # the same of the new samples
    for out in (whole, cut):
        killed_after(monkeypatch, 1, knowledge(store, out, *options))
    go_on_past(store, (64, 314))
    assert fit(*knowledge(store, whole, *options)) == 0
    # The second epoch begins within step 11.
    told = capsys.readouterr().err
    assert "from step 11 on manifest 2, in place of 1" in told
    assert [line["manifest"] for line in metrics(whole)] == [1] * 5 + [2] * 10
    assert metrics(whole)[-1]["left_out"] == 250 % 8
    assert checkpoint.load(whole / "model").about["reads"]["manifest"] == 2
    assert pins(store) == [1]  # of the other run
    # Killed after it has gone over: it goes on in the new samples, which are no longer the newest.
    killed_after(monkeypatch, 2, knowledge(store, cut, *options))
    assert json.loads((cut / "run.json").read_text())["reads"]["manifest"] == 1
    assert fit(*knowledge(store, cut, *options)) == 0
    assert steady(cut)[-1] == steady(whole)[-1]
    assert weights(cut / "model") == weights(whole / "model")
    assert pins(store) == []


def test_what_does_not_serve_is_not_gone_over_to(make_store, tmp_path, monkeypatch, capsys):
    store, out = make_store(), tmp_path / "kd"
    options = knowledge(store, out, "--checkpoint-every", "10", "--log-every", "10", "--follow-latest")
    killed_after(monkeypatch, 1, options)
    go_on_past(store, (0, 256), storage_dtype="float16")
    assert fit(*options) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: manifest 2 is left aside, going on with 1: "
        "main now holds samples in another storage dtype; start another run on them"
    ]
    assert [line["manifest"] for line in metrics(out)] == [1, 1, 1]


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def say_otherwise(path: Path) -> None:
    path.write_text(path.read_text().replace('"rows":', '"rows": 1, "was":', 1))


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        ("path", lose, "is missing"),
        ("path", cut, "bytes"),
        ("commit_path", lose, "is missing"),
        ("commit_path", cut, "is not a valid Commit"),
        ("commit_path", say_otherwise, ""),
        ("manifest", cut, "is not a valid Manifest"),
        ("manifest", say_otherwise, ""),
    ],
)
def test_a_manifest_that_a_fit_would_refuse_is_not_gone_over_to(
    make_store, tmp_path, monkeypatch, capsys, format, name, harm, why
):
    store, out = make_store(format=format), tmp_path / "kd"
    options = knowledge(store, out, "--checkpoint-every", "10", "--log-every", "10", "--follow-latest")
    killed_after(monkeypatch, 1, options)
    go_on_past(store, (0, 300))
    dataset = open_dataset(store)
    path = paths.manifest_path("main", 2) if name == "manifest" else getattr(dataset.shards("train")[-1], name)
    harm(Path(store.local_path(path)))
    capsys.readouterr()
    assert fit(*options) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "going on with" in told
    assert why in told
    assert [line["manifest"] for line in metrics(out)] == [1, 1, 1]


def test_the_same_samples_elsewhere_in_another_format_are_not_other_samples(make_store, tmp_path, monkeypatch, capsys):
    store, other, out = make_store(), make_store("copy", format="webdataset"), tmp_path / "kd"
    go_on_past(other, (64, 320))
    assert fit(*knowledge(store, tmp_path / "whole", "--checkpoint-every", "10")) == 0
    killed_after(monkeypatch, 1, knowledge(store, out, "--checkpoint-every", "10"))
    capsys.readouterr()
    assert "was reading samples" in refused(capsys, *knowledge(other, out))
    assert fit(*knowledge(other, out, "--manifest", "1")) == 0
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(make_store, tmp_path, monkeypatch, capsys):
    store, out = make_store(), tmp_path / "kd"
    assert fit(*knowledge(store, tmp_path / "whole")) == 0
    killed_after(monkeypatch, 2, knowledge(store, out, "--checkpoint-every", "10"))
    (tensors,) = (out / "checkpoints").glob("step-00000020-*/tensors.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    capsys.readouterr()
    assert fit(*knowledge(store, out, "--checkpoint-every", "10")) == 0
    told = capsys.readouterr().err
    assert "warning: " in told
    assert "going on from the checkpoint before" in told
    assert "going on from step 10 of 30" in told
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")


def test_the_best_model_is_the_one_of_the_least_error(make_store, tmp_path):
    store, out = make_store(), tmp_path / "kd"
    # It learns in the first steps, and then the rate is far too high.
    options = ["--steps", "60", "--checkpoint-every", "5", "--validate-every", "5", "--ema", "0", "--decay", "none"]
    assert fit(*knowledge(store, out, *options, "--lr", "1", "--warmup", "50")) == 0
    errors = {line["step"]: line["holdout_error"] for line in metrics(out)}
    best = min(errors, key=errors.get)
    assert best <= 50
    assert checkpoint.load(out / "best").about["steps"] == best
    kept = sorted(int(path.stem[5:]) for path in (out / "checkpoints").glob("*.json"))
    assert kept == [best, 55, 60]


def test_a_run_of_an_earlier_release_goes_on(make_store, tmp_path, monkeypatch, capsys):
    """Its record holds what is free or gone by now."""
    store, out = make_store(), tmp_path / "kd"
    assert fit(*knowledge(store, tmp_path / "whole")) == 0
    killed_after(monkeypatch, 1, knowledge(store, out, "--checkpoint-every", "10"))
    record = json.loads((out / "run.json").read_text())
    assert "block" not in record
    assert record["config"]["teacher"] == {"dtype": "float32"}
    teacher = {"uri": "gone", "dtype": "float32", "offload": True}
    record["config"] |= {"gradient_checkpointing": True, "teacher": teacher}
    (out / "run.json").write_text(json.dumps(record | {"block": 8}))
    assert fit(*knowledge(store, out)) == 0
    assert "going on from step 10 of 30" in capsys.readouterr().err
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")
    record["config"]["teacher"]["dtype"] = "bfloat16"
    (out / "run.json").write_text(json.dumps(record))
    line = refused(capsys, *knowledge(store, out))
    assert "holds a run with teacher.dtype bfloat16, not float32; choose another --out" in line
    (out / "run.json").write_text("[]")
    assert "is not a record of this release's" in refused(capsys, *knowledge(store, out))


def test_checkpoints_that_are_elsewhere_are_asked_for(make_store, tmp_path, monkeypatch, capsys):
    store, out = make_store(), tmp_path / "kd"
    place = ["--checkpoints", str(tmp_path / "place"), "--checkpoint-every", "10"]
    killed_after(monkeypatch, 1, knowledge(store, out, *place))
    capsys.readouterr()
    line = refused(capsys, *knowledge(store, out))
    assert f"has its checkpoints in {tmp_path / 'place'}, there are none in {out}" in line
    killed_after(monkeypatch, 1, knowledge(store, tmp_path / "other", "--checkpoint-every", "10"))
    line = refused(capsys, *knowledge(store, tmp_path / "other", *place))
    assert "holds the checkpoints of kd-" in line
    assert fit(*knowledge(store, out, *place)) == 0
    assert (tmp_path / "place" / "model" / "model.json").is_file()
    assert fit(*knowledge(store, out, *place, "--no-resume", "--seed", "1")) == 0
    assert weights(tmp_path / "place" / "model") == weights(out / "model")


def test_unreadable_samples_end_the_fit_or_give_way(make_store, tmp_path, capsys):
    store = make_store()
    (path,) = Path(store.uri).glob("recipes/*/*/shards/train-00000003-*")
    path.unlink()
    assert "train-00000003" in refused(capsys, *knowledge(store, tmp_path / "kd"))
    options = ["--on-corrupt", "substitute"]
    assert fit(*knowledge(store, tmp_path / "one", *options)) == 0
    assert 0.15 < metrics(tmp_path / "one")[-1]["substituted"] / (30 * 32) < 0.35  # one of four shards
    assert fit(*knowledge(store, tmp_path / "two", *options, "--ahead-mib", "1", "--micro-batch", "32")) == 0
    assert weights(tmp_path / "one" / "model") == weights(tmp_path / "two" / "model")


def test_s3_checkpoints_are_all_that_a_fresh_machine_needs(make_store, bucket, tmp_path, monkeypatch):
    store = make_store()
    options = ["--checkpoint-every", "7", "--log-every", "5", "--validate-every", "7"]
    assert fit(*progressive(store, tmp_path / "whole", *options)) == 0
    validated = [line["step"] for line in metrics(tmp_path / "whole") if "holdout_error" in line]
    assert validated == [7, 14, 20, 27, 34, 40, 47, 54, 60]  # of each stage, as its checkpoints
    options += ["--checkpoints", f"{bucket}/runs/one"]
    killed_after(monkeypatch, 4, progressive(store, tmp_path / "first", *options))
    assert not (tmp_path / "first" / "checkpoints").exists()
    assert fit(*progressive(store, tmp_path / "second", *options)) == 0
    assert fit(*progressive(store, tmp_path / "third", *options)) == 0
    for out in (tmp_path / "second", tmp_path / "third"):
        for folder in ("model", "best", "stages/4-step", "stages/2-step", "stages/1-step"):
            assert weights(out / folder) == weights(tmp_path / "whole" / folder), folder
            assert checkpoint.load(out / folder)
        assert steady(out)[-1] == steady(tmp_path / "whole")[-1]
        assert [line["step"] for line in metrics(out)] == [line["step"] for line in metrics(tmp_path / "whole")]


def test_denoising_makes_a_teacher(tmp_path):
    out = tmp_path / "teacher"
    options = [
        "--objective.name",
        "denoising",
        "--images",
        "sklearn:digits",
        "--steps",
        "40",
        "--save-dtype",
        "float16",
    ]
    assert fit("--out", out, *TINY, *options) == 0
    saved = checkpoint.load(out / "model")
    assert saved.grids == {}
    assert saved.model["num_classes"] == 10
    assert saved.model["prediction"]["name"] == "edm"
    lines = metrics(out)
    assert lines[-1]["loss"] < 1.0
    assert len(saved.weights) < 2.5 * sum(p.numel() for p in saved.build().parameters())


def test_a_fit_needs_neither_ray_nor_the_pipeline(make_store, tmp_path):
    code = (
        "import sys; sys.modules['ray'] = sys.modules['pipeline'] = None; "
        "from limbeck.trainer.__main__ import run; run(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", code, "fit", *knowledge(make_store(), tmp_path / "kd")]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kd" / "model" / "model.json").is_file()
