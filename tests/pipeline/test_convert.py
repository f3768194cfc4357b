"""`convert`: another layout, the same samples to the bit, under the same commits and the same content digest."""

import json

import numpy as np
import pytest

from limbeck.pipeline.job import driver, kept
from limbeck.pipeline.upkeep import relayout
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.store import Store


def dataset(folder, name="main", number=None):
    return open_dataset(Store.open(str(folder)), name, number)


def rows(found):
    """Every column of all rows that readers see, in order."""
    parts = [
        {name: np.asarray(column)[found.rows_inside(shard)] for name, column in found.read(shard).items()}
        for split in SPLITS
        for shard in found.shards(split)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(before, after):
    return before.keys() == after.keys() and all(
        np.array_equal(before[name].view(np.uint8), after[name].view(np.uint8)) for name in before
    )


LAYOUTS = [
    (("--to", "webdataset"), "webdataset-64", 4),
    (("--to", "webdataset", "--samples-per-shard", 32), "webdataset-32", 7),
    (("--to", "parquet", "--samples-per-shard", 32, "--compression", "zstd"), "parquet-zstd-32", 7),
]


@pytest.mark.parametrize(("words", "layout", "shards"), LAYOUTS)
def test_the_same_samples_lie_otherwise(generate, pipeline, tmp_path, words, layout, shards):
    generate(tmp_path, teacher="builtin:digits")
    before = dataset(tmp_path)
    code, out, _ = pipeline("convert", tmp_path, *words, "--json")
    after, told = dataset(tmp_path), json.loads(out)
    assert (code, told["manifest"], told["layout"], told["written"]) == (0, 2, layout, shards)
    assert (after.layout.id, len(after.table), after.manifest.window) == (layout, shards, before.manifest.window)
    assert after.manifest.content_digest == before.manifest.content_digest == told["content_digest"]
    assert after.manifest.train_changed_at == before.manifest.train_changed_at
    assert same(rows(before), rows(after))
    assert pipeline("verify", tmp_path)[0] == 0
    code, out, _ = pipeline("convert", tmp_path, *words)
    assert (code, out.startswith("nothing to do: manifest 2 of main: train [0, 160), holdout [0, 40)")) == (0, True)


def test_its_job_and_its_end_are_told(generate, pipeline, tmp_path):
    generate(tmp_path)
    pipeline("convert", tmp_path, "--to", "webdataset", "--as", "tar")
    code, out, _ = pipeline("status", tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["dataset"], told["state"], told["tasks_done"]) == (0, "tar", "sealed as manifest 1", 4)
    beat = json.loads((tmp_path / "jobs" / told["job"] / "heartbeat.json").read_bytes())
    assert beat["state"] == "sealed"


def test_a_commit_that_is_gone_before_the_sealing_is_made_again(generate, pipeline, tmp_path, monkeypatch):
    """As if a prune had deleted it: the first look right before sealing finds one commit less than was written."""
    generate(tmp_path)
    look, looks = kept.list_records, []

    def missing_one(store, recipe_id, layout_id):
        looks.append(layout_id)
        if len(looks) == 2:
            (commit,) = tmp_path.glob("recipes/*/webdataset-64/commits/train-00000001.json")
            (record,) = tmp_path.glob("recipes/*/webdataset-64/records/train-00000001-*.json")
            commit.unlink(), record.unlink()
        return look(store, recipe_id, layout_id)

    monkeypatch.setattr("limbeck.pipeline.job.kept.list_records", missing_one)
    code, out, err = pipeline("convert", tmp_path, "--to", "webdataset", "--json")
    assert (code, json.loads(out)["written"], "train-00000001, are gone: planning again" in err) == (0, 5, True)
    assert pipeline("verify", tmp_path)[0] == 0


def test_there_and_back_finds_the_old_shards(generate, pipeline, hashes, tmp_path):
    generate(tmp_path)
    before = dataset(tmp_path)
    pipeline("convert", tmp_path, "--to", "webdataset")
    _, out, _ = pipeline("convert", tmp_path, "--to", "parquet", "--json")
    assert json.loads(out)["written"] == 0
    assert dataset(tmp_path).manifest.shards.sha256
    assert [shard.sha256 for shard in dataset(tmp_path).table] == [shard.sha256 for shard in before.table]


def test_larger_shards_are_joined_and_figures_summed(generate, pipeline, tmp_path):
    generate(tmp_path, count=192, holdout=128)
    before = dataset(tmp_path)
    assert pipeline("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 192, "--as", "big")[0] == 2
    generate(tmp_path, count=256, holdout=128)
    before = dataset(tmp_path)
    code, _, _ = pipeline("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 128, "--as", "big")
    after = dataset(tmp_path, "big")
    assert (code, after.manifest.number, len(after.table)) == (0, 1, 3)
    assert dataset(tmp_path).manifest == before.manifest
    assert same(rows(before), rows(after))
    old = [before.commit(shard) for shard in before.table]
    new = [after.commit(shard) for shard in after.table]
    assert sum(it.seconds for it in new) == pytest.approx(sum(it.seconds for it in old))
    assert {it.nfe for it in new} == {7}
    assert {tuple(sorted(it.machine.items())) for it in new} == {tuple(sorted(it.machine.items())) for it in old}
    joined = [old[0].statistics["output"], old[1].statistics["output"]]
    assert new[0].statistics["output"].mean == pytest.approx(sum(part.mean for part in joined) / 2)
    assert new[0].statistics["output"].max == max(part.max for part in joined)


def test_a_window_that_slid_keeps_its_start(generate, pipeline, tmp_path):
    generate(tmp_path, count=256)
    words = ["--teacher", "builtin:gaussian", "--store", tmp_path, "--count", 256, "--holdout", 40, "--runner", "local"]
    layout = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32]
    assert pipeline("regenerate", *words, *layout, "--refresh", 0.3)[0] == 0
    before = dataset(tmp_path)
    assert before.manifest.window.train == (77, 333)
    pipeline("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 32)
    after = dataset(tmp_path)
    assert same(rows(before), rows(after))
    assert after.shards("train")[0].start == 64
    assert after.manifest.content_digest == before.manifest.content_digest


def test_ids_that_were_never_solved_are_refused_with_what_fits(generate, pipeline, tmp_path):
    generate(tmp_path)
    code, _, err = pipeline("convert", tmp_path, "--to", "parquet", "--samples-per-shard", 128)
    assert (code, err.count("\n")) == (2, 1)
    assert "train-00000001 would need ids [192, 256), which no shard of main holds" in err
    assert "choose a divisor of 64, such as 32, 64" in err
    code, _, err = pipeline("convert", tmp_path, "--to", "parquet", "--samples-per-shard", 48)
    assert (code, err.count("\n"), "micro-batch 32" in err) == (2, 1, True)
    code, _, err = pipeline("convert", tmp_path, "--to", "webdataset", "--compression", "zstd")
    assert (code, err.count("\n")) == (2, 1)
    assert not [folder for folder in tmp_path.glob("recipes/*/*-*") if folder.name != "parquet-64"]


def test_quarantined_samples_stay_out(generate, pipeline, tmp_path):
    generate(tmp_path, teacher="python:strange_teachers:nan_teacher")
    before = dataset(tmp_path)
    code, _, _ = pipeline("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 32)
    after = dataset(tmp_path)
    assert (code, after.shards("train").quarantined.tolist()) == (3, [70])
    assert after.manifest.content_digest == before.manifest.content_digest
    assert same(rows(before), rows(after))
    assert pipeline("verify", tmp_path)[0] == 0


def test_missing_tasks_stay_missing(generate, pipeline, tmp_path):
    words = ("--max-missing", 1, "--max-attempts", 1)
    generate(tmp_path, *words, teacher="python:strange_teachers:raising_teacher", count=192, holdout=64)
    before = dataset(tmp_path)
    assert before.manifest.missing == ("train-00000001",)
    assert pipeline("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 192)[0] == 2
    pipeline("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 32)
    after = dataset(tmp_path)
    assert after.manifest.missing == ("train-00000002", "train-00000003")
    assert after.manifest.content_digest == before.manifest.content_digest
    assert pipeline("verify", tmp_path)[0] == 0


def test_a_conversion_that_died_goes_on_where_it_was(generate, pipeline, tmp_path, monkeypatch):
    generate(tmp_path)
    publish, calls = relayout.publish, []

    def dying(order, task, *given, **named):
        calls.append(task)
        if len(calls) > 3:
            raise StoreError("the store is gone")
        return publish(order, task, *given, **named)

    monkeypatch.setattr("limbeck.pipeline.upkeep.relayout.publish", dying)
    words = ("convert", tmp_path, "--to", "webdataset", "--samples-per-shard", 32, "--threads", 1)
    code, _, err = pipeline(*words)
    assert (code, "the store is gone" in err, dataset(tmp_path).manifest.number) == (1, True, 1)
    monkeypatch.setattr("limbeck.pipeline.upkeep.relayout.publish", publish)
    code, out, _ = pipeline(*words, "--json")
    assert (code, json.loads(out)["written"], json.loads(out)["shards"]) == (0, 4, 7)
    assert pipeline("verify", tmp_path)[0] == 0


def test_a_flipped_bit_is_not_carried_over(generate, pipeline, tmp_path):
    generate(tmp_path)
    (path,) = tmp_path.glob("recipes/*/*/shards/train-00000001-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    code, _, err = pipeline("convert", tmp_path, "--to", "webdataset")
    assert (code, "does not match its checksum" in err, dataset(tmp_path).manifest.number) == (1, True, 1)


def test_who_grows_the_dataset_meanwhile_is_not_undone(generate, pipeline, tmp_path, monkeypatch):
    """Another job seals manifest 2 just before the conversion does: it is planned again from there."""
    generate(tmp_path)
    seal, rivals = driver.seal, [300]

    def late(store, draft, shards):
        while rivals:
            generate(tmp_path, count=rivals.pop())
        return seal(store, draft, shards)

    monkeypatch.setattr("limbeck.pipeline.job.driver.seal", late)
    code, out, err = pipeline("convert", tmp_path, "--to", "webdataset", "--json")
    told, after = json.loads(out), dataset(tmp_path)
    assert "another job sealed manifest 2 of main: planning again" in err
    assert (code, told["manifest"], told["written"], after.manifest.window.train) == (0, 3, 6, (0, 300))
    assert after.manifest.content_digest == dataset(tmp_path, number=2).manifest.content_digest
    assert same(rows(after), rows(dataset(tmp_path, number=2)))


def test_a_source_that_is_pruned_before_it_is_opened_is_planned_again(generate, pipeline, tmp_path, monkeypatch):
    """Another job seals manifest 2, and a prune takes 1 away, between the look at the latest and the opening of it."""
    generate(tmp_path)
    rivals = [300]

    def late(*given):
        while rivals:
            generate(tmp_path, count=rivals.pop())
            for _ in range(2):
                assert pipeline("prune", tmp_path, "--keep-manifests", 1, "--grace", "0m")[0] == 0
        return open_dataset(*given)

    monkeypatch.setattr("limbeck.pipeline.upkeep.convert.open_dataset", late)
    code, out, err = pipeline("convert", tmp_path, "--to", "webdataset", "--json")
    assert "manifest 1 of 'main' in" in err
    assert "was pruned" in err
    assert (code, json.loads(out)["what"], err.count("planning again")) == (0, "sealed", 1)
    assert dataset(tmp_path).manifest.window.train == (0, 300)
