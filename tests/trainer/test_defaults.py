"""A default never refuses what was given to a fit, and a run goes on as it began."""

import json

import pytest

from limbeck.storage_schemas.command_line import parse
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.program import COMMANDS
from limbeck.trainer.__main__ import COMMANDS as TRAINER
from limbeck.trainer.config import FitConfig
from limbeck.trainer.reading.order import default_batch
from limbeck.trainer.runs.place import Place
from limbeck.trainer.runs.record import as_begun, earlier_run, new_record
from limbeck.trainer.shuffle import ShuffleConfig, measure

REQUIRED = {
    "fit": "--out r --data p",
    "sample": "r --nfe 1 --out a.png",
    "evaluate": "r --data p",
    "report": "e --out r",
    "classifier": "--out c",
    "shuffle": "--rows 100",
}
UNUSUAL = {
    "fit": [
        "--steps 1", "--steps 20", "--steps 100", "--steps 20 --objective.name progressive",
        "--steps 20 --objective.name dmd", "--steps 20 --objective.name sid", "--steps 20 --objective.name reflow",
        "--warmup 0", "--warmup 2999", "--batch-size 1", "--batch-size 7", "--batch-size 100000", "--micro-batch 384",
        "--micro-batch 1", "--micro-batch 3", "--lanes 3", "--lanes 1000", "--lanes 3 --micro-batch 5",
        "--checkpoint-every 1", "--checkpoint-every 100000", "--validate-every 0", "--validate-every 100000",
        "--log-every 100000", "--keep-last 1", "--ahead-mib 1", "--in-flight-mib 1", "--cache-gib 0.001", "--ema 0",
        "--decay none", "--lr 1", "--clip 0", "--manifest 9", "--save-dtype float16",
    ],
    "sample": ["--count 1", "--count 100000"],
    "evaluate": ["--count 2", "--count 100000", "--nfe 1", "--nfe 3 99"],
    "report": [],
    "classifier": ["--steps 1", "--batch-size 1", "--width 1", "--num-features 2"],
    "shuffle": [
        "--batch-size 1", "--batch-size 100", "--lanes 3", "--lanes 100", "--block 1", "--block 1000", "--count 1",
        "--samples-per-shard 1", "--samples-per-shard 100000",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, all_ in UNUSUAL.items() for given in all_])
def test_one_unusual_value_is_refused_by_no_default(name, given):
    config = parse(COMMANDS[name].config, [*REQUIRED[name].split(), *given.split()], program=name)
    if isinstance(config, ShuffleConfig):
        assert measure(config)["batch_size"] <= 100


def test_every_command_is_in_the_matrix():
    assert set(REQUIRED) == set(UNUSUAL) == set(TRAINER)


def config(**given):
    return FitConfig.model_validate({"out": "run", "data": "pairs"} | given)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, 0), (9, 0), (10, 1), (20, 2), (300, 30), (1000, 100), (3000, 100), (10**6, 100)]
)
def test_the_default_warm_up_is_a_tenth_of_the_steps(steps, expected):
    assert config(steps=steps).optimization.num_warmup == expected


def test_a_warm_up_that_is_given_may_be_refused():
    with pytest.raises(ValueError, match="warmup 20 leaves none of 20 steps"):
        config(steps=20, warmup=20)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 256),
        ({"micro_batch": 64}, 256),
        ({"micro_batch": 48}, 240),
        ({"micro_batch": 384}, 384),
        ({"lanes": 3}, 255),
        ({"lanes": 3, "micro_batch": 10}, 240),
        ({"batch_size": 12}, 12),
    ],
)
def test_the_default_batch_is_of_whole_parts(given, expected):
    assert config(**given).batch.size == expected


def test_a_batch_of_few_rows_is_no_larger_than_they_are():
    assert default_batch(rows=100) == 100
    assert default_batch(3, rows=100) == 99


def record_of(began, tmp_path):
    place = Place(began.out, None)
    record = new_record(began, place, reads={}, model={}, init=None)
    record.save(began.out)
    return place, record


def test_a_run_that_began_with_another_default_goes_on_with_it(tmp_path):
    place, _ = record_of(config(out=tmp_path, steps=500, warmup=100), tmp_path)
    now = config(out=tmp_path, steps=500)
    begun = as_begun(now, earlier_run(now, place))
    assert (now.optimization.num_warmup, begun.optimization.num_warmup) == (50, 100)
    with pytest.raises(UsageError, match="holds a run with warmup 100, not 40"):
        earlier_run(config(out=tmp_path, steps=500, warmup=40), place)


def test_a_record_names_options_as_a_user_does_whatever_group_has_them(tmp_path):
    _, record = record_of(config(out=tmp_path, steps=500, lr=0.5, objective={"name": "dmd"}), tmp_path)
    assert record.config.keys() == {
        "images", "seed", "objective", "init", "told_guidance", "process", "prediction", "sigma_data", "network",
        "critic", "teacher", "batch_size", "lanes", "steps", "lr", "beta1", "warmup", "decay", "clip", "weight_decay",
        "ema", "autocast", "compile",
    }  # fmt: skip
    assert (record.config["steps"], record.config["lr"], record.config["beta1"]) == (500, 0.5, 0.0)


def test_the_record_says_the_warm_up_that_is_used(tmp_path):
    _, record = record_of(config(out=tmp_path, steps=500), tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["warmup"] == 50
    assert record.config["batch_size"] == 256
