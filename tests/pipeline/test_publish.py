"""The end of an attempt: a full scratch folder, and an upload that is long ago."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from limbeck.diffusion.models.teachers import load_teacher
from limbeck.pipeline import producer as producer_module
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.producer import COMMIT_WITHIN, LateAttempt, Producer, ScratchFull, WorkOrder, attempt_task
from limbeck.pipeline.recipe import build_layout, build_recipe
from limbeck.storage_schemas import formats
from limbeck.storage_schemas.commit import Task, read_commit
from limbeck.storage_schemas.store import Store


@pytest.fixture(params=["parquet"])
def producer(request, tmp_path):
    """A worker's inside, with a store of its own."""
    config = GenerateConfig(
        teacher="builtin:gaussian",
        store=str(tmp_path / "s"),
        count=64,
        samples_per_shard=64,
        micro_batch=32,
        format=request.param,
    )
    recipe = build_recipe(config, load_teacher(config.teacher))
    return Producer(WorkOrder(Store.create(config.store), recipe, build_layout(config, recipe), "cpu", 1))


TASK = Task("train", 0, 64)


def standing(producer):
    return read_commit(producer.order.store, producer.order.recipe.id, producer.order.layout.id, TASK.name)


@pytest.mark.parametrize("producer", ["parquet", "webdataset"], indirect=True)
def test_a_full_scratch_folder_is_one_line_and_no_commit(producer, monkeypatch, tmp_path):
    """The kernel's own ENOSPC: the shard's file is /dev/full."""

    def encode(local, *args, **options):
        local.symlink_to("/dev/full")
        return encode_shard(local, *args, **options)

    encode_shard = formats.encode_shard
    monkeypatch.setattr(formats, "encode_shard", encode)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ScratchFull, match=rf"the scratch folder {tmp_path}/scratch is full .No space left.*TMPDIR"):
        producer.run(TASK)
    problem = attempt_task(producer, TASK)
    assert problem.error.startswith("the scratch folder")
    assert standing(producer) is None
    assert not list((tmp_path / "scratch").iterdir()), "the next attempt finds all the room there is"

    monkeypatch.setattr(formats, "encode_shard", encode_shard)
    assert producer.run(TASK) == standing(producer)


def test_no_scratch_folder_at_all_is_one_line(producer, monkeypatch):
    def nowhere(*args, **options):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    with pytest.raises(ScratchFull, match=r"No usable temporary directory.*TMPDIR"):
        producer.run(TASK)


@pytest.mark.parametrize(
    ("slept", "commits"),
    [(timedelta(hours=1), True), (COMMIT_WITHIN, True), (COMMIT_WITHIN + timedelta(seconds=1), False)],
)
def test_an_attempt_commits_late_but_not_too_late(producer, monkeypatch, slept, commits):
    """The clock goes on while the worker sleeps between its upload and its commit."""
    clock = [datetime(2026, 1, 31, 9, 30, tzinfo=UTC)]
    monkeypatch.setattr(producer_module, "utc", lambda: clock[0])
    upload = Store.upload

    def then_sleep(store, local, path):
        upload(store, local, path)
        clock[0] += slept

    monkeypatch.setattr(Store, "upload", then_sleep)
    if commits:
        assert producer.run(TASK).committed_at == clock[0].isoformat() == standing(producer).committed_at
        return
    with pytest.raises(
        LateAttempt, match=r"train-00000000: its upload began at 2026-01-31 09:30 UTC, more than 12:00:00"
    ):
        producer.run(TASK)
    assert standing(producer) is None
    shards = list(Path(producer.order.store.uri).glob("recipes/*/*/shards/*"))
    assert len(shards) == 1, "what was uploaded stays: prune knows when to take it"
    monkeypatch.setattr(Store, "upload", upload)
    assert np.isfinite(producer.run(TASK).seconds)


def test_a_failure_keeps_no_credentials(producer, monkeypatch):
    def fails(*args, **options):
        raise ConnectionError("PUT s3://AKIA:s3cr3t/with+slash@bucket/x failed, as did http://proxy:s3cr3t@host:8080")

    monkeypatch.setattr(producer_module, "solve_task", fails)
    problem = attempt_task(producer, TASK)
    assert problem.error == "ConnectionError: PUT s3://***@bucket/x failed, as did http://***@host:8080"
    assert "test_publish.py" in problem.traceback
    assert "s3cr3t" not in problem.traceback
