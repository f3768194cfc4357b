import pytest

from limbeck.pipeline.windows import Goal, grow, missing_tasks, slide
from limbeck.storage_schemas.layout import Layout
from limbeck.storage_schemas.manifest import Manifest, ShardTableRecord, Window
from limbeck.storage_schemas.paths import shard_table_path

RECIPE, OTHER = "a" * 64, "b" * 64
LAYOUT = Layout(samples_per_shard=64)


def manifest(train, holdout=(0, 0), *, recipe_id=RECIPE, layout=LAYOUT, missing=(), ticks=()):
    return Manifest(
        dataset="main",
        number=3,
        parent_digest=None,
        writer="w",
        recipe_id=recipe_id,
        layout=layout,
        window=Window(train=train, holdout=holdout),
        missing=missing,
        rows={"train": 0, "holdout": 0},
        shards=ShardTableRecord(path=shard_table_path("main", "c" * 64), sha256="c" * 64, count=10**9),
        content_digest="d" * 64,
        ticks=dict(ticks),
        train_changed_at="2026-01-01T00:00:00+00:00",
        sealed_at="2026-01-01T00:00:00+00:00",
    )


def goal(parent, window, *, layout=LAYOUT):
    return Goal("main", parent, RECIPE, layout, window)


@pytest.mark.parametrize(
    ("parent", "train", "holdout"),
    [
        (None, (0, 100), (0, 10)),
        (manifest((0, 60), (0, 5)), (0, 100), (0, 10)),
        (manifest((0, 160), (0, 50)), (0, 160), (0, 50)),
        # A window that was refreshed has moved on: it grows at its end and its start stays.
        (manifest((70, 130), (0, 5)), (70, 170), (0, 10)),
        (manifest((70, 170), (0, 10)), (70, 170), (0, 10)),
        # Another recipe has ids of its own.
        (manifest((70, 900), (0, 50), recipe_id=OTHER), (0, 100), (0, 10)),
    ],
)
def test_the_window_only_ever_grows(parent, train, holdout):
    assert grow(parent, RECIPE, count=100, holdout=10) == Window(train=train, holdout=holdout)


@pytest.mark.parametrize(
    ("fraction", "train"), [(0.1, (80, 180)), (1.0, (170, 270)), (0.25, (95, 195)), (0.001, (71, 171))]
)
def test_a_window_slides_and_keeps_its_size(fraction, train):
    window = Window(train=(70, 170), holdout=(0, 10))
    assert slide(window, fraction) == Window(train=train, holdout=(0, 10))


def test_the_tasks_of_a_window_are_whole_shards_in_a_fixed_order():
    tasks = missing_tasks(goal(None, Window(train=(70, 200), holdout=(0, 10))), ())
    assert [task.name for task in tasks] == ["train-00000001", "train-00000002", "train-00000003", "holdout-00000000"]
    assert [(task.start, task.stop) for task in tasks] == [(64, 128), (128, 192), (192, 256), (0, 64)]


def test_what_the_parent_lists_is_not_missing():
    parent = manifest((0, 128))
    wanted = goal(parent, Window(train=(0, 200)))
    assert wanted.continues
    assert [task.index for task in missing_tasks(wanted, {"train-00000000", "train-00000001"})] == [2, 3]


@pytest.mark.parametrize(
    ("parent", "reached"),
    [
        (None, False),
        (manifest((0, 128)), True),
        (manifest((0, 127)), False),
        (manifest((0, 128), missing=("train-00000001",)), False),
        (manifest((0, 128), recipe_id=OTHER), False),
        (manifest((0, 128), layout=Layout(samples_per_shard=32)), False),
    ],
)
def test_a_goal_is_reached_only_by_the_same_samples_in_the_same_files(parent, reached):
    assert goal(parent, Window(train=(0, 128))).reached is reached


def test_a_million_tasks_are_planned_in_seconds():
    tasks = missing_tasks(goal(None, Window(train=(0, 64_000_000))), frozenset({"train-00000005"}))
    assert len(tasks) == 999_999
