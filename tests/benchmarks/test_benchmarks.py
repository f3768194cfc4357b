"""The benchmarks of the stream, at sizes at which their figures mean nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.benchmarks import peers
from tests.benchmarks.child import Failed, Figures, measured, rate
from tests.benchmarks.contest import Bench, Contender, contenders
from tests.benchmarks.readers import limits
from tests.benchmarks.samples import COLUMNS, STATES, every_shard, make_store, opened
from tests.benchmarks.stream import Results
from tests.benchmarks.waiting import Waited
from tests.benchmarks.watch import MIB, Watch

OURS = Contender("ours, tars, verify always", "ours", {"form": "webdataset", "verify": "always"})
MEMMAPS = Contender("DataLoader over memmaps", "by_memmaps", workers=(0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench")
    make_store(made, 512)
    return made


def test_both_formats_hold_the_same_samples(folder):
    (mine,) = every_shard(folder)
    tars = opened(folder, "webdataset")
    (shard,) = tars.shards("train")
    for name, values in tars.read(shard, [*mine]).items():
        assert values.tobytes() == mine[name].tobytes()


@pytest.mark.faults
def test_a_reader_is_measured_in_processes_of_its_own(folder):
    bench = Bench(folder, 512)
    chosen = bench.prepared([OURS, MEMMAPS])
    assert [each.label for each in chosen] == [OURS.label, "DataLoader over memmaps, 0 workers"]
    bench.round([OURS])
    assert bench.failed == {}
    assert {columns: len(measures) for columns, measures in bench.found[OURS.label].items()} == {"pair": 1, "all": 1}
    # The 512 rows are mapped, and not held.
    (figures,) = bench.found[OURS.label]["all"]
    assert 512 * len(STATES) * 6 / 1024 < figures.files_mib < 60


def test_a_peer_that_is_not_installed_costs_its_row_only(folder, monkeypatch):
    monkeypatch.setattr(peers, "PYTHON", folder / "none")
    bench = Bench(folder, 512)
    assert bench.prepared([each for each in contenders() if each.peer]) == []
    assert all("python -m tests.benchmarks.peers" in reason for reason in bench.failed.values())
    assert len(bench.failed) == 6


def test_a_reader_that_fails_says_why(folder):
    with pytest.raises(Failed, match=r"No module named 'tests\.benchmarks\.readers\.nothing'"):
        measured(sys.executable, "nothing", folder, "pair", 512, {})


def test_a_pass_is_every_sample_at_least():
    batches = iter([256] * 10)
    rate(batches, 1024, (0.0, 60.0))
    assert len([*batches]) == 6


def test_a_pass_of_a_slow_reader_ends_early():
    batches = iter([256] * 10)
    rate(batches, 1024, (0.0, 0.0))
    assert len([*batches]) == 9


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_c_gather_copies_rows():
    rows = np.arange(40, dtype=np.int64).reshape(8, 5)
    chosen, out = np.array([3, 0, 7, 3]), np.empty((4, 5), np.int64)
    addresses = rows.ctypes.data + chosen * rows.strides[0]
    limits._compiled()(addresses.ctypes.data, 4, rows.strides[0], out.ctypes.data)
    np.testing.assert_array_equal(out, rows[chosen])


def test_memory_is_of_the_process_and_its_children():
    child = "import time; held = b'x' * (48 << 20); print(len(held), flush=True); time.sleep(60)"
    program = f"import subprocess, sys; input(); subprocess.run([sys.executable, '-c', {child!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        with Watch(process.pid) as watch:
            watch.on = True
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            watch.look()
        os.killpg(process.pid, signal.SIGKILL)
    assert 48 <= watch.peak.own / MIB < 48 + 16


def figures(name, rate, first):
    return Figures(name, rate, first, 30.0, 500.0)


def test_ratios_are_of_the_same_round_and_goals_are_judged():
    bench = Bench(None, 0)
    rounds = {
        OURS.label: [(150.0, 0.1), (320.0, 0.2), (80.0, 0.9)],
        "webdataset, the same tars, 2 workers": [(10.0, 1.0), (20.0, 1.0), (20.0, 1.0)],
        "mosaicml-streaming, 0 workers": [(30.0, 1.0)] * 3,
        "ours, tars, verify never": [(200.0, 0.1)] * 3,
        "limit: C gather, tars": [(400.0, 0.1)] * 3,
    }
    for label, measures in rounds.items():
        bench.found[label] = {name: [figures("it 1.0", *each) for each in measures] for name in COLUMNS}
    results = Results(bench)
    assert results.ratio(OURS.label, "webdataset", "pair") == 15.0
    said = [line for line in results.goals() if "pair" in line]
    assert said == [
        "met: pair, ours, tars, verify always: 15.0x webdataset; goal 15x",
        "MISSED: pair, ours, tars, verify always: 5.0x mosaicml-streaming; goal 6x",
        "MISSED: pair, ours, tars, verify always: first batch after 0.200 s; goal 0.15 s",
        "pair, ours, tars, verify never: 0.50 of the C gather from the same files",
    ]


def test_a_fits_waiting_is_weighed_by_time(tmp_path):
    # 1 s and 3 s for as many steps: 0.1 s and 0.03 s of them waiting.
    lines = [
        {"samples_per_s": 300.0, "data_wait": 0.10, "first_batch_s": 0.5},
        {"samples_per_s": 100.0, "data_wait": 0.01},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert Waited.of(tmp_path) == Waited(pytest.approx(0.13 / 4), 0.5, pytest.approx(150.0))
