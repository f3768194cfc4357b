"""`reproduce` solves one id anew to the same bits, and says in one line why an id has none."""

import json

import pytest

from limbeck.pipeline.after.duplicates import Sample
from limbeck.pipeline.after.reproduce import agrees, read_sample
from limbeck.pipeline.after.resolve import Replay
from limbeck.pipeline.config import ReproduceConfig
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.store import Store
from tests.pipeline import wrong_shards


@pytest.fixture
def here(monkeypatch):
    """Solve in this process: a test of what is found needs no other."""
    monkeypatch.setattr(
        "limbeck.pipeline.after.reproduce.run_once", lambda function, *arguments, runner: function(*arguments)
    )


def test_a_sample_comes_out_to_the_same_bits_in_a_process_of_its_own(generate, pipeline, commits, tmp_path):
    generate(tmp_path, teacher="builtin:digits")
    code, out, _ = pipeline("reproduce", tmp_path, "--sample", 100, "--json")
    found = json.loads(out)
    assert (code, found["same_bits"], found["sample"], found["split"]) == (0, True, 100, "train")
    assert found["max_difference"] == {"noise": 0.0, "state_002": 0.0, "output": 0.0}
    assert found["solved_on"] == commits(tmp_path)["train-00000001"]["machine"] == found["here"]


@pytest.mark.parametrize("words", [(), ("--dtype", "bfloat16"), ("--format", "webdataset", "--guidance", 2.0)])
def test_every_dtype_and_format(generate, pipeline, here, tmp_path, words):
    generate(tmp_path, *words, teacher="builtin:digits")
    code, out, _ = pipeline("reproduce", tmp_path, "--sample", 39, "--split", "holdout")
    assert (code, out.splitlines()[0]) == (0, "holdout 39: the same bits in every column")
    assert "torch" in out.splitlines()[1]


def test_a_difference_is_told_and_a_tolerance_allows_it(generate, pipeline, here, tmp_path):
    generate(tmp_path, teacher="builtin:digits")
    wrong_shards.spoil(tmp_path, wrong_shards.poison_one_output, tasks={"train-00000000"})
    code, out, _ = pipeline("reproduce", tmp_path, "--sample", 5, "--json")
    found = json.loads(out)
    assert (code, found["same_bits"], found["max_difference"]["state_002"]) == (1, False, 0.0)
    assert found["max_difference"]["output"] == pytest.approx(0.02, abs=1e-3)  # float16 near 1
    code, out, _ = pipeline("reproduce", tmp_path, "--sample", 5)
    assert (code, "other bits; largest difference of each state:" in out) == (1, True)
    assert pipeline("reproduce", tmp_path, "--sample", 5, "--tolerance", 0.01)[0] == 1
    assert pipeline("reproduce", tmp_path, "--sample", 5, "--tolerance", 0.03)[0] == 0
    assert pipeline("reproduce", tmp_path, "--sample", 6)[0] == 0


def test_labels_count_among_the_bits(generate, pipeline, here, tmp_path):
    generate(tmp_path, teacher="builtin:digits")
    wrong_shards.spoil(tmp_path, wrong_shards.bias_labels)
    dataset = open_dataset(Store.open(str(tmp_path)))
    labels = dataset.recipe.condition.num_classes
    codes = {pipeline("reproduce", tmp_path, "--sample", sample)[0] for sample in range(8)}
    assert (labels, codes) == (10, {0, 1})


def test_what_is_not_finite_now_agrees_with_nothing():
    replay = Replay(Sample("train", 1), False, None, {}, {})
    assert not agrees(replay, 1e9)


def test_the_same_bits_are_promised_by_as_many_threads_on_one_machine():
    here = {"host": "h", "device": "cpu", "torch": "2", "threads": "1", "numpy": "2"}
    for solved_on, same in ((here, True), (here | {"numpy": "3"}, True), (here | {"threads": "8"}, False)):
        assert Replay(Sample("train", 1), False, {}, solved_on, here).same_machine is same


def test_an_id_that_has_no_row_is_told_in_one_line(generate, pipeline, here, tmp_path):
    nan = "python:strange_teachers:nan_teacher"
    generate(tmp_path, teacher=nan)
    for words, told in (
        (("--sample", 160), "train 160 is outside of manifest 1 of main: its window is [0, 160)"),
        (("--sample", 41, "--split", "holdout"), "its window is [0, 40)"),
        (("--sample", 70), "train 70 was quarantined"),
        (("--sample", 71), f"allow it to run by --teacher {nan}"),
    ):
        code, _, err = pipeline("reproduce", tmp_path, *words)
        assert (code, err.count("\n"), told in err) == (1, 1, True)
    code, out, _ = pipeline("reproduce", tmp_path, "--sample", 71, "--teacher", nan)
    assert (code, out.splitlines()[0]) == (0, "train 71: the same bits in every column")


def test_an_id_of_a_missing_task_is_told(generate, pipeline, tmp_path):
    words = ("--max-missing", 1, "--max-attempts", 1)
    generate(tmp_path, *words, teacher="python:strange_teachers:raising_teacher")
    code, _, err = pipeline("reproduce", tmp_path, "--sample", 127)
    assert (code, "train 127 is in a task that manifest 1 of main names as missing" in err) == (1, True)
    dataset = open_dataset(Store.open(str(tmp_path)))
    assert read_sample(dataset, Sample("train", 128)).row["sample_id"] == 128


def test_the_default_wants_the_same_bits():
    assert ReproduceConfig(store="s", sample=1).tolerance == 0
