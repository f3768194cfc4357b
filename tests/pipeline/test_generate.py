"""`generate` end to end on one machine: does it once, grows, survives what goes wrong, and says so."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import limbeck.pipeline.generate
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.pipeline.config import GenerateConfig
from limbeck.pipeline.generate import carry_out
from limbeck.pipeline.job import driver
from limbeck.pipeline.job.prepare import prepare
from limbeck.pipeline.windows import Wanted
from limbeck.storage_schemas.dataset import latest_manifest
from limbeck.storage_schemas.manifest import ManifestDraft, Window
from limbeck.storage_schemas.store import Store
from tests.pipeline.handmade import seal_listed

SMALL = ["--solver.steps", 4, "--states", 2, "--samples-per-shard", 64, "--micro-batch", 32]
LARGE = {"teacher": "builtin:gaussian", "count": 640_000, "holdout": 0, "samples_per_shard": 64, "micro_batch": 64}
SLOW = "python:strange_teachers:slow_teacher"


def manifest(store, dataset="main"):
    return latest_manifest(Store.open(str(store)), dataset)


def test_a_window_is_made_once(generate, commits, ids_of, tmp_path):
    code, out, _ = generate(tmp_path)
    assert (code, "4 of 4 tasks run here" in out) == (0, True)
    assert ids_of(tmp_path) == {"train": list(range(160)), "holdout": list(range(40))}
    before = commits(tmp_path)
    code, out, _ = generate(tmp_path)
    assert (
        code,
        out.startswith("nothing to do: manifest 1 of main: train [0, 160), holdout [0, 40), 200 samples"),
    ) == (0, True)
    assert commits(tmp_path) == before
    assert len(list(tmp_path.glob("jobs/*"))) == 1


def test_nothing_to_do_costs_few_requests_and_no_ray(generate, tmp_path, monkeypatch):
    generate(tmp_path)
    asked: list[str] = []
    read, ls = Store.read, Store.list
    monkeypatch.setattr(Store, "read", lambda self, path, **how: asked.append(path) or read(self, path, **how))
    monkeypatch.setattr(Store, "list", lambda self, path: asked.append(path) or ls(self, path))
    code, out, _ = generate(tmp_path, runner="ray")
    assert (code, "nothing to do" in out) == (0, True)
    assert len(asked) <= 8  # store.json twice, then twice the recipe, the list of manifests and the last of them
    few = len(asked)
    run = prepare(GenerateConfig(**LARGE, store=str(tmp_path / "large")))
    seal_listed(run.store, run.recipe, run.layout, 10_000)
    asked.clear()
    assert carry_out(run, lambda parent, recipe_id: Wanted(Window(train=(0, 640_000)))).what == "nothing"
    assert len(asked) <= few, "as many as for a small store: the table of shards isn't read"
    script = (
        "import sys; from limbeck.pipeline.__main__ import COMMANDS, main; code = main(COMMANDS, sys.argv[1:]); "
        "sys.exit(99 if 'ray' in sys.modules else code)"
    )
    words = ["--teacher", "builtin:gaussian", "--store", tmp_path, "--count", 160, "--holdout", 40, "--runner", "ray"]
    command = [sys.executable, "-c", script, "generate", *words, *SMALL]
    assert subprocess.run([*map(str, command)], check=False).returncode == 0


def test_growing_solves_only_what_is_new(generate, commits, ids_of, tmp_path):
    generate(tmp_path, count=100, holdout=0)
    before = commits(tmp_path)
    assert sorted(before) == ["train-00000000", "train-00000001"]
    code, out, _ = generate(tmp_path, count=300, holdout=10)
    assert (code, "4 of 4 tasks run here" in out) == (0, True)
    after = commits(tmp_path)
    assert {name: after[name] for name in before} == before
    assert ids_of(tmp_path) == {"train": list(range(300)), "holdout": list(range(10))}
    assert manifest(tmp_path).parent_digest
    generate(tmp_path, count=50, holdout=10)
    assert manifest(tmp_path).window == Window(train=(0, 300), holdout=(0, 10))


def test_a_stop_that_moves_inside_a_shard_solves_nothing(generate, ids_of, tmp_path):
    generate(tmp_path, count=70)
    code, out, _ = generate(tmp_path, count=80)
    assert (code, "0 of 0 tasks run here" in out) == (0, True)
    assert ids_of(tmp_path)["train"] == list(range(80))


def files(store):
    return sorted(str(path.relative_to(store)) for path in Path(store).rglob("*") if path.is_file())


def test_another_recipe_is_refused_by_what_differs(generate, tmp_path):
    generate(tmp_path)
    before = files(tmp_path)
    words = ["--seed", 1, "--solver.name", "ddim", "--dtype", "float32"]
    code, out, err = generate(tmp_path, *words, count=100)
    told = [
        f"limbeck: dataset main of {tmp_path} holds another recipe: noise.seed 0, you ask for 1; ",
        "solver.name heun, you ask for ddim; ",
        "storage_dtype float16, you ask for float32; ",
        "use --dataset OTHER, or --new-recipe to begin a new window in main\n",
    ]
    assert (code, out, err) == (2, "", "".join(told))
    assert files(tmp_path) == before, "nothing is written, no recipe and no job"


def test_another_teacher_is_told_and_so_is_the_same_one_with_other_weights(generate, tmp_path, monkeypatch):
    generate(tmp_path)
    code, _, err = generate(tmp_path, teacher="builtin:mixture")
    assert (code, err.count("\n")) == (2, 1)
    assert "teacher builtin:gaussian (weights " in err
    assert "you ask for builtin:mixture (weights " in err
    monkeypatch.setattr(
        "limbeck.pipeline.job.prepare.load_teacher", lambda uri, **more: changed(load_teacher(uri, **more))
    )
    code, _, err = generate(tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    old = load_teacher("builtin:gaussian").weights_sha256[:8]
    assert f"holds another recipe: the teacher's weights {old} -> ffffffff changed under builtin:gaussian; use" in err


def changed(teacher):
    return replace(teacher, weights_sha256="f" * 64)


def test_a_new_recipe_begins_a_new_window_in_the_same_dataset(generate, ids_of, tmp_path):
    generate(tmp_path)
    first = manifest(tmp_path)
    assert generate(tmp_path, "--seed", 1, "--new-recipe", count=100)[0] == 0
    assert (manifest(tmp_path).number, manifest(tmp_path).window.train) == (2, (0, 100))
    assert manifest(tmp_path).recipe_id != first.recipe_id
    assert len(ids_of(tmp_path)["train"]) == 100


def test_another_layout_of_the_same_samples_is_refused(generate, tmp_path):
    generate(tmp_path)
    for words in (["--format", "webdataset"], ["--compression", "zstd", "--new-recipe"]):
        code, _, err = generate(tmp_path, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert "holds its samples as parquet-64, you ask for" in err
        assert "which would solve them all again" in err


def test_json_is_one_object_that_says_what_happened(generate, tmp_path):
    code, out, _ = generate(tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["what"], told["manifest"], told["window_before"]) == (0, "sealed", 1, None)
    assert told["window"] == {"train": [0, 160], "holdout": [0, 40]}
    assert told["tasks"] == {"needed": 4, "run": 4, "adopted": 0, "failed": 0}
    assert (tmp_path / "jobs" / told["job"] / "job.json").exists()
    told = json.loads(generate(tmp_path, "--json")[1])
    assert (told["what"], told["job"], told["tasks"]["needed"], told["samples"]) == ("nothing", None, 0, 200)
    code, out, err = generate(tmp_path, "--json", "--seed", 1)
    assert (code, json.loads(out)["what"], err.count("\n")) == (2, "refused", 1)
    assert json.loads(out)["why"] in err
    words = ["--dataset", "poor", "--new-recipe", "--max-attempts", 1, "--json"]
    code, out, _ = generate(tmp_path, *words, teacher="python:strange_teachers:raising_teacher")
    told = json.loads(out)
    assert (code, told["what"], told["missing"], told["tasks"]["failed"]) == (1, "failed", ["train-00000001"], 1)
    words = ["--dataset", "bad", "--json"]
    code, out, _ = generate(tmp_path, *words, teacher="python:strange_teachers:nan_teacher")
    assert (code, json.loads(out)["what"], json.loads(out)["quarantined"]) == (3, "sealed", ["train 70"])


def test_datasets_of_one_store_share_what_is_solved(generate, tmp_path):
    generate(tmp_path)
    _, out, _ = generate(tmp_path, "--dataset", "second")
    assert "0 of 4 tasks run here" in out
    assert manifest(tmp_path, "second").content_digest == manifest(tmp_path).content_digest


@pytest.mark.parametrize("words", [("--format", "webdataset"), ("--compression", "zstd"), ("--dtype", "bfloat16")])
def test_every_layout_and_dtype_verifies(generate, pipeline, ids_of, tmp_path, words):
    generate(tmp_path, *words)
    assert ids_of(tmp_path)["train"] == list(range(160))
    code, out, _ = pipeline("verify", tmp_path)
    assert (code, "every id is there once" in out) == (0, True)


def test_processes_write_the_same_bytes_as_one(generate, hashes, tmp_path):
    generate(tmp_path / "one", teacher="builtin:digits")
    generate(tmp_path / "three", "--workers", 3, teacher="builtin:digits")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "three")
    assert len(hashes(tmp_path / "one")) == 4


def test_the_order_of_tasks_does_not_matter(generate, hashes, tmp_path, monkeypatch):
    generate(tmp_path / "ahead")
    plan = limbeck.pipeline.generate.missing_tasks
    monkeypatch.setattr(limbeck.pipeline.generate, "missing_tasks", lambda *given: plan(*given)[::-1])
    generate(tmp_path / "back")
    assert hashes(tmp_path / "ahead") == hashes(tmp_path / "back")


def test_a_store_in_memory(generate):
    code, out, _ = generate("memory://generate-in-memory")
    assert (code, "4 of 4 tasks run here" in out) == (0, True)


def test_weights_are_kept_beside_the_recipe(generate, tmp_path):
    generate(tmp_path, "--with-weights")
    (folder,) = tmp_path.glob("recipes/*/teacher")
    assert checkpoint.load(folder).model["kind"] == "gaussian"


def test_damaged_weights_are_named(generate, pipeline, tmp_path):
    generate(tmp_path, "--with-weights", teacher="builtin:digits")
    assert pipeline("verify", tmp_path)[0] == 0
    (weights,) = tmp_path.glob("recipes/*/teacher/model.safetensors")
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    code, out, _ = pipeline("verify", tmp_path)
    assert (code, f"{weights} does not match" in out) == (1, True)


def test_samples_that_are_not_finite_are_quarantined(generate, pipeline, ids_of, tmp_path):
    code, out, _ = generate(tmp_path, teacher="python:strange_teachers:nan_teacher")
    assert code == 3
    assert "quarantined, because they are not finite: 1 samples (train 70)" in out
    assert ids_of(tmp_path)["train"] == [i for i in range(160) if i != 70]
    assert pipeline("verify", tmp_path)[0] == 0
    code, out, _ = generate(tmp_path, teacher="python:strange_teachers:nan_teacher")
    assert (code, "nothing to do" in out) == (3, True)


def test_a_quarantined_sample_outside_the_window_is_nobodys_concern(generate, tmp_path):
    assert generate(tmp_path, teacher="python:strange_teachers:nan_teacher", count=65)[0] == 0
    code, out, _ = generate(tmp_path, teacher="python:strange_teachers:nan_teacher", count=100)
    assert (code, "0 of 0 tasks run here" in out) == (3, True), "it was solved before, and is in the window now"


def test_a_task_that_keeps_failing_is_set_aside_and_the_others_finish(generate, pipeline, commits, tmp_path):
    teacher = "python:strange_teachers:raising_teacher"
    code, out, err = generate(tmp_path, teacher=teacher)
    assert code == 1
    assert "nothing sealed: 1 tasks are missing, 0 may be: train-00000001" in out
    assert "train-00000001 set aside after 3 attempts: ArithmeticError: this teacher can't see sample 70" in err
    assert sorted(commits(tmp_path)) == ["holdout-00000000", "train-00000000", "train-00000002"]
    assert manifest(tmp_path) is None
    (failure,) = tmp_path.glob("jobs/*/failures/*.json")
    assert "strange_teachers.py" in failure.read_text()
    _, out, _ = pipeline("status", tmp_path)
    assert "ended with 1 tasks missing, nothing sealed" in out


def test_recheck_makes_again_what_is_lost(generate, pipeline, ids_of, tmp_path):
    generate(tmp_path)
    code, out, _ = generate(tmp_path, "--recheck")
    assert (code, "nothing to do" in out, "every listed shard is there" in out) == (0, True, True)
    first, second = sorted(tmp_path.glob("recipes/*/*/records/train-*.json"))[:2]
    first.unlink()
    (first.parent.parent / "commits" / f"{first.stem[:14]}.json").unlink()
    assert "nothing to do" in generate(tmp_path)[1], "what the parent lists isn't looked up"
    assert pipeline("verify", tmp_path)[0] == 1
    code, out, _ = generate(tmp_path, "--recheck")
    assert (code, "1 of 1 tasks run here" in out, manifest(tmp_path).number) == (0, True, 2)
    assert ids_of(tmp_path)["train"] == list(range(160))
    assert pipeline("verify", tmp_path)[0] == 0
    next(iter(tmp_path.glob(f"recipes/*/*/shards/{second.stem}.*"))).write_bytes(b"short")
    code, out, err = generate(tmp_path, "--recheck")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"1 tasks ({second.stem[:14]}) have a commit in {tmp_path} but their shard is gone or cut short" in err
    second.unlink()
    assert generate(tmp_path, "--recheck")[0] == 0
    assert pipeline("verify", tmp_path)[0] == 0


def test_a_window_with_a_gap_is_sealed_only_where_that_is_allowed(generate, pipeline, ids_of, tmp_path):
    teacher = "python:strange_teachers:raising_teacher"
    code, out, _ = generate(tmp_path, "--max-missing", 1, "--max-attempts", 1, teacher=teacher)
    assert (code, "missing, and named in the manifest: train-00000001" in out) == (0, True)
    assert manifest(tmp_path).missing == ("train-00000001",)
    assert ids_of(tmp_path)["train"] == [*range(64), *range(128, 160)]
    assert pipeline("verify", tmp_path)[0] == 0
    code, out, _ = generate(tmp_path, "--max-missing", 1, "--max-attempts", 1, teacher=teacher)
    assert (code, "nothing new" in out, manifest(tmp_path).number) == (0, True, 1)
    beats = [json.loads(path.read_bytes())["state"] for path in tmp_path.glob("jobs/*/heartbeat.json")]
    assert sorted(beats) == ["failed", "sealed"], "no other job made what it asked for"
    # A gap that was allowed once is no reason to allow it for ever.
    assert generate(tmp_path, "--max-attempts", 1, teacher=teacher)[0] == 1


def test_a_task_set_aside_is_tried_again_by_the_next_run(generate, ids_of, tmp_path, monkeypatch):
    monkeypatch.setenv("STRANGE_MARKER", str(tmp_path / "marker"))
    teacher = "python:strange_teachers:recovering_teacher"
    store = tmp_path / "store"
    code, _, _ = generate(store, "--max-attempts", 1, "--max-missing", 1, teacher=teacher)
    assert (code, manifest(store).missing) == (0, ("train-00000001",))
    code, out, _ = generate(store, "--max-attempts", 1, teacher=teacher)
    assert (code, "1 of 1 tasks run here" in out, manifest(store).missing) == (0, True, ())
    assert ids_of(store)["train"] == list(range(160))


def test_a_worker_process_that_is_killed_is_replaced(generate, hashes, tmp_path, monkeypatch):
    monkeypatch.setenv("STRANGE_MARKER", str(tmp_path / "marker"))
    teacher = "python:strange_teachers:killed_teacher"
    code, _, err = generate(tmp_path / "killed", "--workers", 2, teacher=teacher)
    assert (code, "set aside" in err, (tmp_path / "marker").exists()) == (0, False, True)
    generate(tmp_path / "unharmed", teacher=teacher)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "unharmed")


@pytest.mark.faults
def test_a_task_that_kills_every_worker_is_set_aside(generate, commits, tmp_path):
    teacher = "python:strange_teachers:deadly_teacher"
    code, _, err = generate(tmp_path, "--workers", 2, teacher=teacher)
    assert (code, "its worker died: exit code -9" in err) == (1, True)
    assert sorted(commits(tmp_path)) == ["holdout-00000000", "train-00000000", "train-00000002"]


def test_a_worker_that_can_not_load_its_teacher_ends_the_job_in_one_line(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("STRANGE_PLANNER", str(os.getpid()))
    code, _, err = generate(tmp_path, "--workers", 2, teacher="python:strange_teachers:picky_teacher")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("limbeck: ")]
    assert "can't start: RuntimeError: no such accelerator" in line


def test_a_job_that_is_killed_goes_on_where_it_was(generate, start, pipeline, commits, ids_of, tmp_path, monkeypatch):
    given = ["--teacher", SLOW, "--store", tmp_path, "--count", 400, "--holdout", 40]
    job = start("generate", *given, *SMALL, "--runner", "local", "--workers", 2, STRANGE_DELAY="0.05")
    wait_until(lambda: len(commits(tmp_path)) >= 2)
    workers = children_of(job.pid)
    job.send_signal(signal.SIGKILL)
    job.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers))
    before = commits(tmp_path)
    assert 2 <= len(before) < 8
    assert manifest(tmp_path) is None
    assert "running" in pipeline("status", tmp_path)[1]
    code, out, _ = generate(tmp_path, teacher=SLOW, count=400)
    assert (code, f"{8 - len(before)} of 8 tasks run here" in out) == (0, True)
    after = commits(tmp_path)
    assert {name: after[name] for name in before} == before
    assert ids_of(tmp_path) == {"train": list(range(400)), "holdout": list(range(40))}
    assert pipeline("verify", tmp_path)[0] == 0


def test_two_jobs_at_once_make_one_dataset(start, pipeline, commits, ids_of, tmp_path):
    given = ["--teacher", SLOW, "--store", tmp_path, "--count", 300, "--holdout", 40, "--runner", "local"]
    jobs = [start("generate", *given, *SMALL, STRANGE_DELAY="0.01") for _ in range(2)]
    told = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    assert (len(commits(tmp_path)), manifest(tmp_path).number) == (6, 1)
    assert ids_of(tmp_path) == {"train": list(range(300)), "holdout": list(range(40))}
    assert pipeline("verify", tmp_path)[0] == 0


def test_who_loses_the_race_to_seal_plans_again_from_the_winner(generate, ids_of, tmp_path, monkeypatch):
    seal = driver.seal
    rivals = [{"window": Window(train=(0, 64)), "writer": "rival"}]

    def beaten(store, draft, shards):
        while rivals:
            seal(store, ManifestDraft(**dict(draft) | rivals.pop()), shards)
        return seal(store, draft, shards)

    monkeypatch.setattr(driver, "seal", beaten)
    code, _, err = generate(tmp_path)
    assert code == 0
    assert "another job sealed manifest 1 of main: planning again" in err
    assert (manifest(tmp_path).number, manifest(tmp_path).window.train) == (2, (0, 160))
    assert ids_of(tmp_path) == {"train": list(range(160)), "holdout": list(range(40))}


def test_a_store_that_hides_what_is_sealed_ends_the_planning(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "latest_manifest", lambda store, dataset: None)
    assert generate(tmp_path)[0] == 0
    code, _, err = generate(tmp_path)
    assert code == 1
    assert err.count("planning again") == 8
    assert err.splitlines()[-1].startswith(
        f"limbeck: planned 8 times from manifest 0, the latest that {tmp_path} shows: another job keeps it from"
    )


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
