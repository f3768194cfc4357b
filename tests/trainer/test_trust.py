"""What a store, a record or a card names is used only if the user names it, too; a bad one is told in a line."""

import json
from pathlib import Path

import pytest
import torch

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint
from limbeck.diffusion.models.teachers import builtin_checkpoint, check_unasked, load_teacher
from limbeck.diffusion.recipes.teacher import NoTeacher, TeacherSource
from limbeck.storage_schemas.errors import ManifestMismatch, UsageError
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.evaluation.costs import student_costs
from limbeck.trainer.planning.trajectories import plan_trajectories
from limbeck.trainer.runs.logs import RunLog
from limbeck.trainer.runs.place import Place, lines_of
from limbeck.trainer.runs.record import RunRecord, new_record
from tests.trainer.evaluation.test_costs import line, make_run
from tests.trainer.test_evaluate import make_recipe, make_store, save_student

NAMED = {
    "a folder": "{here}/model",
    "a relative folder": "model",
    "a hub id": "diffusers:attacker/model",
    "a pipeline's folder": "diffusers:{here}/pipeline",
    "an address": "http://127.0.0.1:9/x",
    "a bucket": "s3://bucket/model",
    "code": "python:os:abort",
    "code of no name": "python::",
    "nothing": "",
    "a shipped one's folder": "builtin:../../../../{here}/model",
    "an absolute one": "builtin:{here}/model",
}


@pytest.fixture
def opened(monkeypatch):
    """Whatever is opened, asked or imported for a teacher."""
    asked: list[object] = []
    for name in ("checkpoint.load", "pipeline_checkpoint", "_from_factory"):
        monkeypatch.setattr(f"limbeck.diffusion.models.teachers.{name}", lambda *told, **more: asked.append(told))
    return asked


@pytest.mark.parametrize("uri", NAMED.values(), ids=NAMED)
def test_a_teacher_that_only_a_recipe_names_is_not_touched(tmp_path, opened, uri):
    save_student(builtin_checkpoint("gaussian"), tmp_path, 1)
    uri = uri.format(here=tmp_path)
    recipe = make_recipe(builtin_checkpoint("gaussian"), uri=uri)
    store = make_store(tmp_path / "pairs", builtin_checkpoint("gaussian"), recipe)
    lines = []
    source = TeacherSource(store, recipe, flag="--teacher.uri")
    for load in (source.load, source.checkpoint):
        with pytest.raises(NoTeacher) as told:
            load()
        lines.append(str(told.value))
    assert opened == []
    assert all("\n" not in line and uri in line for line in lines)


def test_what_the_user_names_is_used(tmp_path):
    saved = builtin_checkpoint("gaussian")
    checkpoint.save(saved, tmp_path / "model")
    uri = str(tmp_path / "model")
    recipe = make_recipe(saved, uri=uri)
    store = make_store(tmp_path / "pairs", saved, recipe)
    source = TeacherSource(store, recipe, uri)
    assert source.load().uri == uri
    assert source.checkpoint() == saved


def test_what_is_shipped_is_used_unasked():
    check_unasked("builtin:digits", flag="--teacher")
    assert load_teacher("builtin:gaussian").num_classes is None


@pytest.mark.parametrize("objective", ["knowledge", "dmd"])
def test_a_fit_can_name_the_teacher_that_it_starts_from(objective):
    given = {"out": "run", "data": "pairs", "objective": {"name": objective}, "teacher": {"uri": "model"}}
    assert FitConfig(**given).teacher.uri == "model"
    if objective == "knowledge":
        with pytest.raises(ValueError, match="teacher: knowledge has none"):
            FitConfig(**given, init="scratch")


def test_no_store_is_asked_but_the_users(tmp_path, monkeypatch):
    saved = builtin_checkpoint("gaussian")
    store = make_store(tmp_path / "pairs", saved, make_recipe(saved, uri="builtin:gaussian"))
    run = make_run(tmp_path / "run", store, [line(10, 160.0)])
    assert student_costs(run, 1, store.uri).teacher_seconds == pytest.approx(0.2)
    record = json.loads((run / "run.json").read_text())
    record["reads"]["data"] = "s3://attacker/pairs"
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("limbeck.trainer.evaluation.costs.Store", None)
    assert student_costs(run, 1, store.uri).teacher_seconds is None


def test_no_run_is_read_but_those_beside_it(tmp_path):
    saved = builtin_checkpoint("gaussian")
    store = make_store(tmp_path / "pairs", saved, make_recipe(saved, uri="builtin:gaussian"))
    apart = make_run(tmp_path / "apart/first", store, [line(10, 160.0)])
    run = make_run(tmp_path / "runs/second", store, [line(10, 80.0)], init=apart)
    assert student_costs(run, 1, store.uri).train_seconds == pytest.approx(4)


MODEL = builtin_checkpoint("digits").model
RECORD = {"name": "run-1", "config": {}, "reads": {}, "model": MODEL, "place": None, "init": None}
RECORDS = {
    "up": {"name": "../../x"},
    "a path": {"name": "a/b"},
    "an escape": {"name": "\x1b[2J"},
    "a new line": {"name": "a\n"},
    "no name": {"name": ""},
    "a number": {"name": 5},
    "a config of no fields": {"config": []},
    "reads in words": {"reads": "x"},
    "a model in words": {"model": "x"},
    "a place that is none": {"place": 5},
    "an init that is none": {"init": "x"},
    "more than there is": {"more": 1},
}
TEXTS = {
    "empty": b"",
    "cut": b"{",
    "deep": b"[" * 200_000,
    "bytes": b"\xff",
    "a list": b"[]",
    "long": b" " * (17 << 20),
}


@pytest.mark.parametrize(
    "data",
    [*(json.dumps({**RECORD, **changes}).encode() for changes in RECORDS.values()), *TEXTS.values()],
    ids=[*RECORDS, *TEXTS],
)
def test_a_record_that_is_none_is_refused_in_a_line_and_does_not_keep_a_run_from_starting_again(tmp_path, data):
    assert RunRecord.from_bytes(json.dumps(RECORD).encode(), "run.json").name == "run-1"
    with pytest.raises(UsageError, match=r"^run\.json is not a record of this release's; .* by --no-resume$"):
        RunRecord.from_bytes(data, "run.json")
    config = FitConfig(out=tmp_path / "run", data="pairs", resume=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(data)
    record = new_record(config, Place(config.out, None), reads={}, model=MODEL, init=None)
    assert record.name.startswith("run-")


LINES = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"\xff\xfe",
    b"[" * 200_000,
    b"{}",
    b'{"step": "x"}',
    b'{"step": 1, "loss": []}',
    b"null",
]


@pytest.mark.parametrize("bad", LINES, ids=range(len(LINES)))
def test_a_line_of_metrics_that_is_none_is_named_and_left_out(tmp_path, capsys, bad):
    good = [{"step": step, "loss": 0.1 * step, "stage": "x"} for step in (1, 2, 3)]
    text = [json.dumps(one).encode() for one in good]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([text[0], bad, *text[1:], b'{"step": 4, "lo']))
    assert lines_of(tmp_path / "metrics.jsonl") == good
    with RunLog(tmp_path, step=2, total=5) as log:
        log.write(3, {"loss": 1.0})
    assert "warning: metrics.jsonl had 1 lines that are no figures, which are left out" in capsys.readouterr().err
    assert lines_of(tmp_path / "metrics.jsonl") == [*good[:2], {"step": 3, "loss": 1.0}]


def test_a_card_runs_no_torchscript(tmp_path, monkeypatch):
    """A saved model and a run's record may name an LPIPS file: only a command line's own is loaded."""
    monkeypatch.setattr(torch.jit, "load", lambda *told, **more: pytest.fail("a TorchScript file is loaded"))
    about = {"objective": {"name": "consistency", "distance": "lpips", "lpips": str(tmp_path / "evil.pt")}}
    torch.manual_seed(0)
    saved = builtin_checkpoint("digits")
    checkpoint.save(Checkpoint(saved.model, saved.weights, {1: (80.0, 0.0)}, about), tmp_path / "model")
    Path(tmp_path / "evil.pt").write_bytes(b"x")
    assert checkpoint.load(tmp_path / "model").about == about
    load_teacher(str(tmp_path / "model"))
    store = Store(str(tmp_path / "model"))
    assert store.read("run.json") is None


@pytest.mark.parametrize("model", [{}, {"kind": "network"}, {**MODEL, "sample_shape": None}, {**MODEL, "process": []}])
def test_a_recipe_that_describes_no_teacher_is_refused_in_a_line(tmp_path, model):
    recipe = make_recipe(builtin_checkpoint("gaussian"), uri="builtin:gaussian")
    teacher = recipe.teacher.model_copy(update={"model": model})
    store = make_store(
        tmp_path / "pairs", builtin_checkpoint("gaussian"), recipe.model_copy(update={"teacher": teacher})
    )
    with pytest.raises(ManifestMismatch, match=r"^recipe .{12} describes no teacher of ours \(model.*\): restore it$"):
        plan_trajectories(FitConfig(out="run", data=store.uri, init="scratch"), number=1)
