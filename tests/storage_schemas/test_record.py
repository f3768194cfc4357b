import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from limbeck.storage_schemas.canonical import canonical_json, digest
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.errors import StoreError, UsageError
from limbeck.storage_schemas.layout import Layout, check_layout
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import (
    Columns,
    bfloat16_bits,
    bfloat16_values,
    check_columns,
    segment_fields,
    state_column,
    trajectory_fields,
)
from limbeck.storage_schemas.store import StoreDocument

DATA = {"kind": "data", "images": "npz:a.npz", "digest": "cd" * 32}
ODD = {"name": "ddim", "steps": 3, "frame": "sigma", "grid": {"name": "karras"}}
FOUR = {"times": (3.0, 2.0, 1.0, 0.0), "alphas": (1.0,) * 4, "sigmas": (3.0, 2.0, 1.0, 0.0)}
RECIPE_ID = "fb081625282b96257bb7fce5003e095f83f9277e3a8adb2999511b94a554fb11"
Make = Callable[..., Recipe]


def test_canonical_json_is_one_byte_string_for_one_meaning() -> None:
    assert canonical_json({"b": [1.0, 0.1], "a": {"ü": None}}) == '{"a":{"ü":null},"b":[1,0.1]}'.encode()
    assert digest({"sigma_max": 80, "end": -0.0}) == digest({"end": 0, "sigma_max": 80.0})
    assert digest((1, 2)) == digest([1, 2]) != digest([2, 1])
    # sha256 of '{}', as sha256sum prints it
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_canonical_json_refuses_what_json_has_not(bad: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json([bad])
    with pytest.raises(TypeError, match="keys are strings"):
        canonical_json({1: bad})


def test_state_columns_follow_the_grid() -> None:
    assert [state_column(i, 16) for i in (0, 6, 16)] == ["noise", "state_006", "output"]
    with pytest.raises(ValueError, match="0 to 16"):
        state_column(17, 16)
    fields = trajectory_fields((1, 8, 8), "float16", 16, (0, 8, 16))
    assert [f.name for f in fields] == ["sample_id", "condition", "noise", "state_008", "output"]
    assert [f.nbytes for f in fields] == [8, 8, 128, 128, 128]
    assert [f.name for f in segment_fields((3,), "bfloat16")][2:] == [
        "start_index", "data_id", "segment_0", "segment_1", "segment_2",
    ]  # fmt: skip


def test_bfloat16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 is half way between 1 (even) and 1 + 2^-7; 1 + 3 * 2^-8 half way up to 1 + 2^-6 (even).
    values = np.array([1.0, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -2.5, np.inf, 3.4e38])
    expected = np.array([1.0, 1.0, 1 + 2**-7, 1 + 2**-6, -2.5, np.inf, np.inf], np.float32)
    np.testing.assert_array_equal(bfloat16_values(bfloat16_bits(values)), expected)
    assert np.isnan(bfloat16_values(bfloat16_bits(np.array([np.nan, -np.nan])))).all()


def test_recipe_id_is_golden_and_every_line_changes_it(make_recipe: Make) -> None:
    assert make_recipe().id == RECIPE_ID
    again = Recipe.from_bytes(make_recipe().to_bytes(), "memory")
    assert again == make_recipe()
    assert again.id == RECIPE_ID
    assert b'"sigma_max":80.0' in again.to_bytes()
    changes: dict[str, object] = {
        "guidance": {"scale": 2.0},
        "states": (0, 1, 4),
        "noise": {"algorithm": "philox4x64-as241", "version": 1, "seed": 8},
        "storage_dtype": "bfloat16",
        "solve_dtype": "float64",
        "tf32": True,
        "compile": "default",
        "channels_last": True,
        "micro_batch": 4,
        "numerics_version": 2,
        "condition": {"kind": "none"},
        "sigmas": (80.0, 17.5, 2.5, 0.12500000000000003, 0.0),
    }
    ids = {make_recipe(**{name: value}).id for name, value in changes.items()} | {RECIPE_ID}
    assert len(ids) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": (1.0, 0.0)}, "times has 2 points, 4 steps need 5"),
        ({"times": (80.0, 17.5, 17.5, 0.125, 0.0)}, "descend"),
        ({"alphas": (1.0, 1.0, 1.0, 1.0, float("nan"))}, "finite"),
        ({"states": (0, 2)}, "end with 4"),
        ({"states": (2, 4)}, "begin with 0"),
        ({"states": (0, 4, 2)}, "ascend"),
        ({"micro_batch": 0}, "greater than or equal to 1"),
        ({"notes": "fast"}, "Extra inputs"),
        ({"start": {"kind": "image"}}, "kind"),
        ({"start": DATA}, "a trajectory starts from the prior"),
        ({"start": DATA, "chain": "segment"}, "an even number of steps and no states"),
        ({"chain": "segment", "states": (), "solver": ODD, **FOUR}, "an even number of steps"),
    ],
)
def test_recipe_refuses_what_cannot_be_meant(make_recipe: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_recipe(**changes)


def test_segments_from_data_name_their_images_and_hold_their_labels(make_recipe: Make) -> None:
    given: dict[str, object] = {
        "chain": "segment",
        "states": (),
        "condition": {"kind": "data_labels", "num_classes": 9},
    }
    recipe = make_recipe(**given, start=DATA)
    assert Recipe.from_bytes(recipe.to_bytes(), "memory") == recipe
    assert [field.name for field in recipe.fields][2:] == [
        "start_index", "data_id", "segment_0", "segment_1", "segment_2"
    ]  # fmt: skip
    others = [DATA | {"digest": "ef" * 32}, DATA | {"images": "npz:b.npz"}, {"kind": "prior"}]
    assert len({recipe.id, *(make_recipe(**given, start=other).id for other in others)}) == 4


def test_layout_ids_and_micro_batches(make_recipe: Make) -> None:
    assert Layout().id == "parquet-2048"
    assert Layout(compression="zstd").id == "parquet-zstd-2048"
    assert Layout(format="webdataset", samples_per_shard=512).id == "webdataset-512"
    with pytest.raises(ValidationError, match="not compressed"):
        Layout(format="webdataset", compression="zstd")
    check_layout(make_recipe(), Layout(samples_per_shard=16))
    with pytest.raises(UsageError, match="12 samples per shard is not a multiple of the micro-batch 8"):
        check_layout(make_recipe(), Layout(samples_per_shard=12))


def test_tasks_are_full_shards() -> None:
    task = Task("holdout", 3, 512)
    assert (task.name, task.start, task.stop) == ("holdout-00000003", 1536, 2048)
    assert Task.parse("holdout-00000003", 512) == task
    with pytest.raises(ValueError, match="train-00000003"):
        Task.parse("stranger", 512)


def test_columns_are_checked_before_they_are_written(recipe: Recipe, make_columns: Callable[..., Columns]) -> None:
    task = Task("train", 0, 8)
    columns = make_columns(recipe, task)
    assert check_columns(recipe.fields, columns) == 8
    with pytest.raises(ValueError, match=r"column output is float32\[8, 2, 3, 5\], not float16\[8, 2, 3, 5\]"):
        check_columns(recipe.fields, {**columns, "output": columns["output"].astype(np.float32)})
    with pytest.raises(ValueError, match="ascend"):
        check_columns(recipe.fields, {**columns, "sample_id": columns["sample_id"][::-1]})
    with pytest.raises(ValueError, match="are not the record's"):
        check_columns(recipe.fields, {"sample_id": columns["sample_id"]})


def test_a_document_that_is_not_ours_is_one_line() -> None:
    with pytest.raises(
        StoreError, match=r"^x has schema version 1, this program reads 2: use the release that wrote it$"
    ):
        StoreDocument.from_bytes(b'{"schema_version": 1, "writer": "a"}', "x")
    with pytest.raises(StoreError, match="x is not a valid StoreDocument") as caught:
        StoreDocument.from_bytes(b"<html>", "x")
    assert "\n" not in str(caught.value)


def test_the_module_prints_json_schemas() -> None:
    printed = subprocess.run([sys.executable, "-m", "storage_schemas"], capture_output=True, check=True).stdout
    schemas = json.loads(printed)
    assert len(schemas) == 12
    assert schemas["recipes/<recipe id>/recipe.json"]["additionalProperties"] is False
