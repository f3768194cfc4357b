"""Whole fits on several processes, by the real torchrun over gloo: the same losses, stopped, on bad shards."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
from tests.trainer.test_fit import go_on_past, killed_after

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "--init", "scratch", "--network.width", "16", "--network.depth", "1", "--warmup", "2", "--batch-size", "32",
    "--threads", "1", "--device", "cpu", "--log-every", "10", "--validate-every", "20", "--checkpoint-every", "20",
]  # fmt: skip
ROUNDING = 2e-5
"""What another order of sums may change of a loss, relatively: found to be below 4e-6 over 4,000 steps."""


def start(out: Path, store, *options, ranks: int = 1) -> subprocess.Popen:
    """`limbeck fit`, or torchrun's of so many ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launch if ranks > 1 else []), "-m", "limbeck.trainer", "fit"]
    words = [*command, "--data", store.uri, "--out", str(out), *TINY, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def fit(out: Path, store, *options) -> None:
    """In this process."""
    words = ["fit", "--data", store.uri, "--out", str(out), *TINY, *map(str, options)]
    assert main(COMMANDS, words) == 0


def told_by(out: Path, store, *options, ranks: int = 1, code: int = 0) -> str:
    """What processes of their own have printed."""
    process = start(out, store, *options, ranks=ranks)
    _, told = process.communicate(timeout=200)
    assert process.returncode == code, told
    return told


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same_losses(out: Path, whole: Path, *, cut_at: int = 0) -> None:
    """The mean over the steps between two lines is another where a restart came between them."""
    ours, theirs = metrics(out), metrics(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for here, there in zip(ours, theirs, strict=True):
        names = {"holdout_error", "substituted"} | ({"loss"} if not cut_at < here["step"] < cut_at + 10 else set())
        for name in names & there.keys():
            assert here[name] == pytest.approx(there[name], rel=ROUNDING, abs=0), (here["step"], name)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(path.stem[5:]) >= step for path in (out / "checkpoints").glob("step-*.json")):
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.mark.faults
def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(make_store, tmp_path):
    store, whole, out = make_store(), tmp_path / "whole", tmp_path / "cut"
    fit(whole, store, "--steps", 400)
    process = start(out, store, "--steps", 400, ranks=2)
    wait_for_step(out, 20, process)
    second = children(process.pid)[1]
    os.kill(second, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert "saved on a signal; the same command goes on" in told
    assert not (out / "model").exists()
    cut_at = markers(out)[-1]["step"]
    fit(out, store, "--steps", 400)
    check_same_losses(out, whole, cut_at=cut_at)


def children(pid: int) -> list[int]:
    """By their age, so that rank 0 is the first."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def markers(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "checkpoints").glob("step-*.json"))]


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_weights_that_are_spread_go_on_over_another_number_of_ranks(make_store, bucket, tmp_path):
    store, whole, out = make_store(), tmp_path / "whole", tmp_path / "cut"
    fit(whole, store, "--steps", 40)
    place = ["--checkpoints", f"{bucket}/runs/one", "--parallel", "fsdp", "--steps", 40]
    process = start(out, store, *place, ranks=2)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "best" / "model.json").exists():
        time.sleep(0.02)
    os.kill(children(process.pid)[0], signal.SIGTERM)
    process.communicate(timeout=200)
    assert not (out / "model").exists()
    told = told_by(tmp_path / "other", store, *place, ranks=4)
    cut_at = int(re.search(r"going on from step (\d+) of", told)[1])
    check_same_losses(tmp_path / "other", whole, cut_at=cut_at)


@pytest.mark.faults
def test_ranks_go_over_to_a_newer_manifest_together(make_store, tmp_path, monkeypatch):
    store, whole, out = make_store(count=250), tmp_path / "whole", tmp_path / "out"
    options = ["--follow-latest", "--steps", 60, "--checkpoint-every", 5]
    for folder in (whole, out):
        killed_after(monkeypatch, 1, ["--data", store.uri, "--out", str(folder), *TINY, *map(str, options)])
    go_on_past(store, (64, 314))
    fit(whole, store, *options)
    told = told_by(out, store, *options, ranks=2)
    assert "from step 8 on manifest 2, in place of 1" in told
    check_same_losses(out, whole)
    assert [line["manifest"] for line in metrics(out)] == [line["manifest"] for line in metrics(whole)] == [2] * 6


@pytest.mark.faults
def test_what_both_ranks_fail_by_is_told_once_and_so_is_a_lost_rank(make_store, tmp_path):
    store, out = make_store(), tmp_path / "out"
    (line,) = ours(told_by(out, store, "--manifest", 9, ranks=2, code=1))
    assert "manifest 9" in line
    process = start(out, store, "--steps", 5000, ranks=2)
    wait_for_step(out, 20, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert set(ours(told)) <= {"limbeck: another process of torchrun's was lost; the same command goes on"}
    assert "gloo" not in told


def ours(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("limbeck: ")]


def spoil(store, number: int, how: str) -> None:
    """Flip a bit of a train shard's outputs, or remove the shard."""
    (path,) = Path(store.uri).glob(f"recipes/*/*/records/train-{number:08d}-*.json")
    commit = json.loads(path.read_text())
    shard = Path(store.uri) / commit["path"]
    if how == "missing":
        shard.unlink()
        return
    offset = next(chunk["offset"] for chunk in commit["chunks"] if chunk["column"] == "output")
    data = bytearray(shard.read_bytes())
    data[offset + 99] ^= 1
    shard.write_bytes(data)


@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("shard", "how"), [(0, "flipped"), (3, "flipped"), (2, "missing")])
def test_what_is_unreadable_ends_the_fit_or_gives_way(make_store, tmp_path, shard, how):
    store = make_store()
    spoil(store, shard, how)
    told = told_by(tmp_path / "failed", store, "--steps", 20, ranks=2, code=1)
    lines = ours(told)
    assert len(lines) in (1, 2)  # each may have failed by other bytes
    assert all(f"train-{shard:08d}" in line for line in lines), lines
    assert "gloo" not in told
    options = ["--steps", "40", "--on-corrupt", "substitute"]
    fit(tmp_path / "one", store, *options)
    told_by(tmp_path / "out", store, *options, ranks=2)
    check_same_losses(tmp_path / "out", tmp_path / "one")
    last = metrics(tmp_path / "out")[-1]
    assert last["substituted"] == pytest.approx(40 * 32 / 4, rel=0.35)  # a quarter of the rows
