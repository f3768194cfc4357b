"""What documents say can't steer a terminal: control characters and markup in every text of every document."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.storage_schemas import paths
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.job import Failure, Heartbeat, Job, Pin, Prune
from limbeck.storage_schemas.manifest import Window
from limbeck.storage_schemas.notes import Calibration, CalibrationPoint, Reference, put_calibration
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store
from tests.pipeline.handmade import LAYOUT, make_recipe, seal_window
from tests.trainer.conftest import write_store

AT, LATER = "2026-01-31T23:59:59+00:00", "2999-01-01T00:00:00+00:00"
HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]owned[/red][link=http://x]owned[/link]\r\x9b31m\u202e\nforged"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
NETWORK = "--network.name residual_mlp --network.width 4 --network.depth 1"
FIT = f"--objective.name knowledge --init scratch {NETWORK} --steps 2 --batch-size 4 --device cpu"


def hostile_recipe() -> Recipe:
    """One whose every free text is hostile, and that is valid all the same."""
    plain = make_recipe().plain()
    plain["teacher"] |= {"uri": HOSTILE, "model": {HOSTILE: HOSTILE}}
    plain["solver"] |= {"name": HOSTILE, "grid": {"name": HOSTILE, HOSTILE: HOSTILE}}
    plain["noise"] |= {"algorithm": HOSTILE}
    return Recipe.model_validate(plain)


def fill(folder: Path, recipe: Recipe) -> Store:
    """A store with one document of each kind at least."""
    store = Store.create(str(folder))
    seal_window(store, (0, 8), at=AT, recipe=recipe)
    job = Job(
        job="job-1", dataset="main", recipe_id=recipe.id, layout=LAYOUT, window=Window(train=(0, 16)), parent=1,
        tasks_total=4, tasks_missing=2, runner=HOSTILE, workers=1, started_at=AT,
    )  # fmt: skip
    failed = Failure(task="train-00000002", error=HOSTILE, traceback=HOSTILE, attempts=3, machine=HOSTILE, failed_at=AT)
    note = Calibration(
        teacher=recipe.teacher, guidance=recipe.guidance, condition=recipe.condition, grid=recipe.solver.grid,
        solve_dtype="float32", autocast="none", tf32=False, seed=0, count=8, tolerance=0.1, scale=1.0,
        reference=Reference(solver=HOSTILE, steps=8, nfe=15, error=0.1), choice=0, machine={HOSTILE: HOSTILE},
        points=(CalibrationPoint(solver=recipe.solver.name, steps=1, nfe=7, error=0.1, low=0.1, high=0.2),), made_at=AT,
    )  # fmt: skip
    put_calibration(store, recipe, note)
    for path, document in {
        paths.job_path("job-1"): job,
        paths.heartbeat_path("job-1"): Heartbeat(at=AT, state="running"),
        paths.failure_path("job-1", failed.task): failed,
        paths.pin_path("run-1"): Pin(run="run-1", dataset="main", number=1, expires_at=LATER),
        paths.prune_path(1): Prune(run="prune-1", machine=HOSTILE, at=AT, ended=True),
    }.items():
        store.write(path, document.to_bytes())
    return store


@pytest.fixture
def shown(capfdbinary):
    """Run a command in this process: what it said on stdout and stderr, which holds no control character."""

    def run(*words: object) -> str:
        told = [str(word) for word in words]
        main(COMMANDS, told)
        said = "".join(stream.decode() for stream in capfdbinary.readouterr())
        found = CONTROLS.search(said)
        assert found is None, said[max(found.start() - 200, 0) :]
        raw = sum(said.count(f"{before}owned") for before in ("0;", "[red]", "[link=http://x]"))
        assert said.count("owned") == raw, f"markup was taken for markup: {said}"
        assert not any(line.startswith("forged") for line in said.splitlines()), f"a line was made up: {said}"
        return said

    return run


def readers(folder: Path) -> dict[str, list[list[object]]]:
    """The commands that read each kind of document, by the first folder of its path."""
    inspect, verify, status, prune = (
        ["inspect", folder],
        ["verify", folder],
        ["status", folder],
        ["prune", folder, "--dry-run"],
    )
    lineage = ["inspect", folder, "--lineage"]
    return {
        "store.json": [inspect],
        "recipes": [inspect, lineage, verify],
        "datasets": [inspect, verify, prune],
        "jobs": [status, prune],
        "pins": [prune],
        "prunes": [["prune", folder]],
    }


def texts(plain: Any) -> Iterator[Any]:
    """The document once for each of its texts and names of fields, with that one hostile."""
    for place in _places(plain):
        other = copy.deepcopy(plain)
        at = other
        for key in place[:-1]:
            at = at[key]
        value, key = at[place[-1]], place[-1]
        if isinstance(value, str):
            at[key] = HOSTILE
            yield other
        if isinstance(key, str) and (isinstance(value, str) or len(place) == 1):
            renamed = copy.deepcopy(other)
            inner = renamed
            for step in place[:-1]:
                inner = inner[step]
            inner[HOSTILE] = inner.pop(key)
            yield renamed


def _places(plain: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    inner = plain.items() if isinstance(plain, dict) else enumerate(plain[:1]) if isinstance(plain, list) else ()
    for key, value in inner:
        yield from _places(value, (*at, key))


def test_texts_of_valid_documents_are_shown_as_they_are(shown, tmp_path):
    folder = tmp_path / "store"
    fill(folder, hostile_recipe())
    shell = {name: shown(*words) for name, words in {
        "inspect": ["inspect", folder], "lineage": ["inspect", folder, "--lineage"], "verify": ["verify", folder],
        "status": ["status", folder], "prune": ["prune", folder], "json": ["inspect", folder, "--json"],
        "reproduce": ["reproduce", folder, "--sample", "1"],
    }.items()}  # fmt: skip
    for name in ("inspect", "lineage", "status", "reproduce"):
        assert "\\x1b[2J" in shell[name], (name, shell[name])
        assert "[red]owned[/red]" in shell[name], (name, shell[name])


def test_no_text_of_any_document_steers_a_terminal(shown, tmp_path):
    folder = tmp_path / "store"
    store = fill(folder, make_recipe())
    tried = 0
    for path in {path.parent: path for path in sorted(folder.rglob("*.json"))}.values():  # one of each kind
        relative = path.relative_to(folder).as_posix()
        data = path.read_bytes()
        for other in texts(json.loads(data)):
            path.write_text(json.dumps(other))
            for words in readers(folder)[relative.split("/")[0]]:
                said = shown(*words)
                assert "Traceback" not in said
                tried += 1
        store.write(relative, data)
    assert tried > 300


def test_names_of_files_steer_no_terminal(shown, tmp_path):
    folder = tmp_path / "store"
    fill(folder, make_recipe())
    name = HOSTILE.replace("/", "_")
    for parent in {path.parent for path in folder.rglob("*.json")} - {folder}:
        (parent / f"{name}.json").write_text("{}")
        (parent / f"{name}.parquet").write_text("x")
    for words in {str(words): words for each in readers(folder).values() for words in each}.values():
        assert "Traceback" not in shown(*words)


def test_a_record_and_metrics_of_a_run_steer_no_terminal(shown, tmp_path):
    folder, out = tmp_path / "store", tmp_path / "fit"
    write_store(folder, count=64, holdout=16, states=(), samples_per_shard=16)
    words = ["fit", "--data", folder, "--out", out, *FIT.split(), "--checkpoint-every", "1"]
    assert "fitted in 2 steps" in shown(*words)
    metrics = json.dumps({"step": 1, "stage": HOSTILE}) + "\n" + json.dumps({"step": 1, HOSTILE: 1}) + "\n\x1b[2J\n{\n"
    (out / "metrics.jsonl").write_text(metrics)
    assert "fitted in 2 steps" in shown(*words)
    record = json.loads((out / "run.json").read_text())
    for other in texts(record):
        (out / "run.json").write_text(json.dumps(other))
        assert "Traceback" not in shown(*words)
    (out / "run.json").write_text(json.dumps(record))
    for marker in sorted((out / "checkpoints").glob("*.json")):
        for other in texts(json.loads(marker.read_bytes())):
            marker.write_text(json.dumps(other))
            assert "Traceback" not in shown(*words)
