"""A default never refuses what was given: sizes that are left open follow those given, and what is there."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.pipeline.__main__ import COMMANDS as PIPELINE
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.recipe import _whole_shard, build_layout, build_recipe
from limbeck.pipeline.rounds.config import ProgressiveConfig
from limbeck.pipeline.rounds.record import Record
from limbeck.storage_schemas.command_line import parse
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.program import COMMANDS

REQUIRED = {
    "generate": "--teacher builtin:gaussian --store s --count 9",
    "regenerate": "--teacher builtin:gaussian --store s --count 9",
    "plan": "--teacher builtin:gaussian --store s --count 9",
    "progressive": "--teacher builtin:gaussian --store s --count 9 --out r",
    "parity": "--teacher diffusers:pipeline",
    "calibrate": "--teacher builtin:gaussian",
    "status": "s",
    "verify": "s",
    "reproduce": "s --sample 0",
    "inspect": "s",
    "convert": "s --to parquet",
    "prune": "s",
}
OF_A_JOB = [
    "--count 1", "--count 1000000", "--holdout 2", "--holdout 100000", "--samples-per-shard 1",
    "--samples-per-shard 128", "--samples-per-shard 100", "--samples-per-shard 2053", "--samples-per-shard 8192",
    "--micro-batch 384", "--micro-batch 1", "--micro-batch 3", "--micro-batch 4096", "--micro-batch auto",
    "--format webdataset", "--compression zstd", "--workers 7", "--ray.min-workers 4", "--max-missing 9",
    "--max-attempts 1", "--max-quarantined 1", "--drain-seconds 0", "--straggler-seconds 0.1", "--threads 9",
]  # fmt: skip
OF_A_RECIPE = [
    "--solver.steps 1", "--solver.steps 200", "--states 1 2 15", "--states", "--solver.name ddim",
    "--solver.times 80 1 0", "--solver.grid uniform_time --solver.shift 3",
    "--start data:sklearn:digits", "--start data:sklearn:digits --solver.steps 2", "--dtype float32",
]  # fmt: skip
UNUSUAL = {
    "generate": [*OF_A_JOB, *OF_A_RECIPE],
    "regenerate": [*OF_A_JOB, *OF_A_RECIPE, "--policy grow", "--policy recipe", "--policy grow --grow-by 1"],
    "plan": [*OF_A_JOB, *OF_A_RECIPE, "--time-batches 1", "--time-batches 99"],
    "progressive": [*OF_A_JOB, "--steps 2", "--steps 6", "--schedule 4 2 1", "--schedule 1", "--fit.steps 20"],
    "calibrate": ["--count 8", "--count 5000", "--steps 1", "--steps 3", "--reference-factor 2", "--micro-batch 1"],
    "parity": ["--steps 1", "--steps 1000", "--count 1", "--solver dpmpp_2m"],
    "verify": ["--audit 2", "--audit 100000"],
    "convert": ["--samples-per-shard 1", "--samples-per-shard 100000", "--threads 1"],
    "prune": ["--keep-manifests 1", "--grace 1m"],
}


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, all_ in UNUSUAL.items() for given in all_])
def test_one_unusual_value_is_refused_by_no_default(name, given):
    config = parse(COMMANDS[name].config, [*REQUIRED[name].split(), *given.split()], program=name)
    if isinstance(config, GenerateConfig) and config.start == "prior":
        recipe = build_recipe(config, load_teacher(config.teacher))
        layout = build_layout(config, recipe)
        assert layout.samples_per_shard % recipe.micro_batch == 0
        assert config.micro_batch in (None, "auto", recipe.micro_batch)
        assert config.samples_per_shard in (None, layout.samples_per_shard)


def test_every_command_is_in_the_matrix():
    assert {*REQUIRED, "submit"} == set(PIPELINE)
    assert set(UNUSUAL) | {"status", "reproduce", "inspect"} == set(REQUIRED)


def sizes(**given):
    config = GenerateConfig.model_validate({"teacher": "builtin:gaussian", "store": "s", "count": 9} | given)
    recipe = build_recipe(config, load_teacher(config.teacher))
    return build_layout(config, recipe).samples_per_shard, recipe.micro_batch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (2048, 256)),
        ({"samples_per_shard": 512}, (512, 256)),
        ({"samples_per_shard": 128}, (128, 128)),
        ({"samples_per_shard": 1000}, (1000, 250)),
        ({"samples_per_shard": 257}, (257, 1)),
        ({"micro_batch": 64}, (2048, 64)),
        ({"micro_batch": 384}, (1920, 384)),
        ({"micro_batch": 4096}, (4096, 4096)),
    ],
)
def test_the_size_that_is_not_given_fits_the_one_that_is(given, expected):
    assert sizes(**given) == expected


def test_both_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="micro-batch 384 does not divide 2048 samples per shard"):
        sizes(micro_batch=384, samples_per_shard=2048)


def test_a_default_names_the_recipe_that_it_named_when_it_was_given():
    both = [{}, {"samples_per_shard": 2048, "micro_batch": 256, "solver": {"name": "heun"}, "holdout": 2048}]
    teacher = load_teacher("builtin:gaussian")
    ids = {
        build_recipe(
            GenerateConfig.model_validate({"teacher": teacher.uri, "store": "s", "count": 9} | given), teacher
        ).id
        for given in both
    }
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("sample_bytes", "micro_batch", "expected"),
    [
        (1, 1, 2048),
        (128 << 10, 1, 2048),
        ((128 << 10) + 1, 1, 1024),
        (1 << 20, 1, 256),
        (18 << 20, 1, 8),
        (1 << 40, 1, 1),
        (18 << 20, 256, 256),
        (1 << 20, 96, 192),
    ],
)
def test_default_shards_follow_bytes(sample_bytes, micro_batch, expected):
    assert _whole_shard(SimpleNamespace(sample_bytes=sample_bytes, micro_batch=micro_batch)) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 2), (8, 2), (64, 8), (100, 12), (16384, 2048), (16400, 2048), (10**9, 2048)]
)
def test_the_holdout_follows_the_count(count, expected):
    assert GenerateConfig(teacher="t", store="s", count=count).num_holdout == expected
    assert GenerateConfig(teacher="t", store="s", count=count, holdout=0).num_holdout == 0


def manifests(store):
    return {path.name: path.read_bytes() for path in Path(store).glob("datasets/main/manifests/*")}


BARE = ["--teacher", "builtin:gaussian", "--runner", "local", "--solver.steps", "4"]


@pytest.mark.parametrize(
    "made",
    [
        [],
        ["--holdout", "700"],
        ["--samples-per-shard", "64"],
        ["--samples-per-shard", "64", "--micro-batch", "16"],
        ["--samples-per-shard", "60", "--micro-batch", "20", "--holdout", "90"],
        ["--micro-batch", "384"],
        ["--format", "webdataset"],
        ["--compression", "zstd", "--samples-per-shard", "64"],
    ],
)
def test_a_dataset_that_is_there_goes_on_as_it_is(pipeline, tmp_path, made):
    asked = ["generate", *BARE, "--store", tmp_path, "--count", 64]
    code, _, err = pipeline(*asked, *made)
    assert code == 0, err
    before = manifests(tmp_path)
    code, out, err = pipeline(*asked)
    assert (code, "nothing to do" in out) == (0, True), err
    assert manifests(tmp_path) == before
    code, out, err = pipeline(*asked, "--count", 128)
    assert (code, len(list(Path(tmp_path).glob("recipes/*/recipe.json")))) == (0, 1), err


def test_a_job_that_sealed_nothing_goes_on_as_it_began(pipeline, tmp_path):
    asked = ["generate", *BARE, "--store", tmp_path, "--count", 64]
    assert pipeline(*asked, "--samples-per-shard", "64", "--micro-batch", "16")[0] == 0
    for manifest in Path(tmp_path).glob("datasets/main/manifests/*"):
        manifest.unlink()  # as if it had died just before it sealed
    code, out, err = pipeline(*asked)
    assert (code, "0 of 2 tasks run here" in out) == (0, True), err


def test_another_recipe_has_sizes_of_its_own(pipeline, tmp_path):
    asked = ["generate", *BARE, "--store", tmp_path, "--count", 64]
    assert pipeline(*asked, "--samples-per-shard", "64", "--micro-batch", "16")[0] == 0
    assert pipeline(*asked, "--seed", "1", "--new-recipe")[0] == 0
    held = [json.loads(path.read_bytes()) for path in Path(tmp_path).glob("recipes/*/recipe.json")]
    assert sorted(recipe["micro_batch"] for recipe in held) == [16, 256]


@pytest.mark.parametrize("given", [["--samples-per-shard", "128"], ["--format", "webdataset"]])
def test_what_is_given_is_not_replaced_by_what_is_there(pipeline, tmp_path, given):
    asked = ["generate", *BARE, "--store", tmp_path, "--count", 64]
    assert pipeline(*asked, "--samples-per-shard", "64", "--micro-batch", "16")[0] == 0
    code, _, err = pipeline(*asked, *given)
    assert (code, "holds its samples as parquet-64, you ask for" in err) == (2, True)


def progressive(tmp_path, **given):
    return ProgressiveConfig.model_validate(
        {"teacher": "t", "store": "s", "count": 16, "out": tmp_path, "fit": ()} | given
    )


def test_the_first_steps_follow_the_schedule(tmp_path):
    assert progressive(tmp_path).num_steps == 16
    assert progressive(tmp_path, schedule=(4, 2, 1)).num_steps == 8
    assert progressive(tmp_path, steps=4).schedule == (2, 1)
    with pytest.raises(ValueError, match="does not halve 16 steps"):
        progressive(tmp_path, schedule=(4, 2, 1), steps=16)


def test_rounds_that_began_with_other_defaults_go_on(tmp_path):
    Record(progressive(tmp_path, holdout=2048, samples_per_shard=2048, micro_batch=256, format="parquet")).note_round(8)
    Record(progressive(tmp_path))
    with pytest.raises(UsageError, match="holds rounds with micro_batch 256, not 128"):
        Record(progressive(tmp_path, micro_batch=128))
