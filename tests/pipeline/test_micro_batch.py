"""`--micro-batch auto`: the largest that fits, found once; what goes on with it names the same recipe."""

import json
from pathlib import Path

import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.job.micro_batch import gpu_share, shortened, sizes
from limbeck.pipeline.recipe import build_recipe
from limbeck.storage_schemas.recipe import Recipe

AUTO = ["--micro-batch", "auto"]


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Let a hungry teacher have room for so many samples; the sizes that it was shown."""
    diary = tmp_path / "diary"
    monkeypatch.setenv("HUNGRY_DIARY", str(diary))

    def of(samples):
        monkeypatch.setenv("HUNGRY_ROOM", str(samples))
        diary.write_text("")
        return lambda: [int(line) for line in diary.read_text().split()]

    return of


def recipes_in(store):
    return {path.parent.name: json.loads(path.read_bytes()) for path in Path(store).glob("recipes/*/recipe.json")}


def test_what_is_tried():
    assert sizes(2048) == [2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert sizes(12) == [12, 6, 3]
    assert sizes(16384)[0] == 4096
    assert sizes(5001) == [5001]  # nothing smaller divides a shard by halving


def test_a_trial_takes_as_much_memory_as_the_solve_and_less_time():
    teacher = load_teacher("builtin:gaussian")
    given = {"teacher": teacher.uri, "store": "s", "count": 1}
    long = build_recipe(GenerateConfig.model_validate(given | {"states": (2, 9, 15)}), teacher)
    short = shortened(long)
    assert (short.num_steps, short.states) == (4, (0, 1, 2, 3, 4))
    assert short.times == (*long.times[:4], 0.0)
    assert Recipe.model_validate(short.plain()) == short
    many = build_recipe(GenerateConfig.model_validate(given | {"states": tuple(range(8))}), teacher)
    assert (shortened(many).num_steps, len(shortened(many).states)) == (8, len(many.states))
    few = build_recipe(GenerateConfig.model_validate(given | {"solver": {"steps": 2}}), teacher)
    assert shortened(few) == few


def test_workers_that_share_a_gpu_get_their_part_of_it():
    def share(**fields):
        return gpu_share(GenerateConfig.model_validate({"teacher": "t", "store": "s", "count": 1} | fields))

    assert share(runner="local", workers=4) == 0.25
    assert share(ray={"num_gpus": 0.5}, workers=4) == 0.5
    assert share(ray={"num_gpus": 2}) == share(ray={"num_gpus": 0}) == 1


@pytest.mark.parametrize(("name", "tried"), [("gpu_teacher", [64, 32, 16]), ("cpu_teacher", [64, 32, 16])])
def test_the_largest_that_fits_is_found_by_halving_and_frozen(at_home, generate, room, tmp_path, name, tried):
    shown = room(20)
    store = tmp_path / "store"
    code, out, err = generate(store, *AUTO, teacher=f"python:hungry_teachers:{name}", holdout=0)
    assert code == 0, out + err
    assert "micro-batch 16: found by a trial" in err
    (recipe,) = recipes_in(store).values()
    assert recipe["micro_batch"] == 16
    assert list(dict.fromkeys(shown())) == tried
    by_hand = tmp_path / "by_hand"
    generate(by_hand, "--micro-batch", "16", teacher=f"python:hungry_teachers:{name}", holdout=0)
    assert recipes_in(by_hand) == recipes_in(store)


def test_a_rerun_takes_the_number_of_what_it_goes_on_with(at_home, generate, room, tmp_path):
    """Also where memory has become scarce since: the same number, or a clear failure, but never another recipe."""
    store, teacher = tmp_path / "store", "python:hungry_teachers:gpu_teacher"
    room(32)
    generate(store, *AUTO, teacher=teacher, count=64, holdout=0)
    shown = room(1000)
    code, _, err = generate(store, *AUTO, teacher=teacher, count=128, holdout=0)
    assert (code, len(recipes_in(store))) == (0, 1)
    assert "micro-batch 32, as in what is in" in err
    assert set(shown()) == {32}
    shown = room(16)
    code, out, _ = generate(store, *AUTO, teacher=teacher, count=192, holdout=0)
    assert (code, len(recipes_in(store))) == (1, 1)
    assert set(shown()) == {32}
    assert "train-00000002: out of memory on cpu with 32 samples together: the recipe fixes the micro-batch" in out


def test_a_rerun_after_a_job_that_sealed_nothing_does_too(at_home, generate, room, tmp_path):
    store, teacher = tmp_path / "store", "python:hungry_teachers:gpu_teacher"
    room(32)
    assert generate(store, *AUTO, teacher=teacher, holdout=0)[0] == 0
    for manifest in Path(store).glob("datasets/main/manifests/*"):
        manifest.unlink()  # as if it had died just before it sealed
    shown = room(1000)
    code, out, err = generate(store, *AUTO, teacher=teacher, holdout=0)
    assert (code, shown()) == (0, [])
    assert "micro-batch 32, as in" in err
    assert "0 of 3 tasks run here" in out


def test_also_where_a_job_of_another_recipe_came_between(at_home, generate, room, tmp_path):
    store, teacher = tmp_path / "store", "python:hungry_teachers:gpu_teacher"
    room(32)
    assert generate(store, *AUTO, teacher=teacher, count=64, holdout=0)[0] == 0
    room(16)
    assert generate(store, *AUTO, "--seed", "1", "--new-recipe", teacher=teacher, count=64, holdout=0)[0] == 0
    for manifest in Path(store).glob("datasets/main/manifests/*"):
        manifest.unlink()
    shown = room(1000)
    code, _, err = generate(store, *AUTO, teacher=teacher, count=64, holdout=0)
    assert (code, shown()) == (0, [])
    assert "micro-batch 32, as in" in err


def test_another_recipe_is_tried_anew(at_home, generate, room, tmp_path):
    store, teacher = tmp_path / "store", "python:hungry_teachers:gpu_teacher"
    room(32)
    generate(store, *AUTO, teacher=teacher, count=64, holdout=0)
    room(16)
    code, _, err = generate(store, *AUTO, "--seed", "1", "--new-recipe", teacher=teacher, count=64, holdout=0)
    assert code == 0
    assert "micro-batch 16: found" in err
    assert sorted(recipe["micro_batch"] for recipe in recipes_in(store).values()) == [16, 32]


def test_a_recipe_that_the_dataset_refuses_is_refused_before_any_trial(at_home, generate, room, tmp_path):
    store, teacher = tmp_path / "store", "python:hungry_teachers:gpu_teacher"
    room(32)
    generate(store, *AUTO, teacher=teacher, count=64, holdout=0)
    shown = room(1000)
    code, _, err = generate(store, *AUTO, "--seed", "1", teacher=teacher, count=64, holdout=0)
    assert (code, shown()) == (2, [])
    assert "holds another recipe: noise.seed 0, you ask for 1; use --dataset OTHER" in err


@pytest.mark.faults
def test_a_worker_that_is_killed_has_met_a_size_that_is_too_large(generate, room, tmp_path):
    shown = room(16)
    store, teacher = tmp_path / "store", "python:hungry_teachers:doomed_teacher"
    code, _, err = generate(store, *AUTO, teacher=teacher, count=64, holdout=0)
    assert code == 0, err
    assert [recipe["micro_batch"] for recipe in recipes_in(store).values()] == [16]
    assert list(dict.fromkeys(shown())) == [64, 32, 16]
    assert "a micro-batch of 64 or less is too large" in err


def test_no_room_for_one_sample_is_one_line_and_leaves_no_recipe(at_home, generate, room, tmp_path):
    room(0)
    code, _, err = generate(tmp_path / "store", *AUTO, teacher="python:hungry_teachers:gpu_teacher")
    assert code == 1
    assert err.count("\n") == 1
    assert "has no room for 1 samples of python:hungry_teachers:gpu_teacher together" in err
    assert recipes_in(tmp_path / "store") == {}


def test_what_is_not_a_lack_of_memory_is_not_tried_again(generate, room, tmp_path):
    shown = room(1000)
    code, _, err = generate(tmp_path / "store", *AUTO, teacher="python:hungry_teachers:wrong_teacher")
    assert (code, shown()) == (1, [64])
    assert "expected scalar type Float but found Half" in err
