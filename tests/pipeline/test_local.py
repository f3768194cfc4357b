"""Worker processes of this machine: what the store keeps of one that died."""

import json

import pytest


@pytest.mark.faults
@pytest.mark.parametrize(
    ("teacher", "error", "traceback"),
    [
        ("crashing_teacher", "exit code -11, SIGSEGV", "strange_teachers.py"),
        ("deadly_teacher", "exit code -9, SIGKILL (perhaps out of memory: see the machine's kernel log)", ""),
    ],
)
def test_a_task_that_kills_its_process_leaves_the_signal_and_the_place(generate, tmp_path, teacher, error, traceback):
    words = ["--workers", 2, "--max-attempts", 1]
    code, _, err = generate(tmp_path, *words, teacher=f"python:strange_teachers:{teacher}", count=128, holdout=0)
    assert (code, f"train-00000001 set aside after 1 attempts: its worker died: {error}" in err) == (1, True)
    failures = [json.loads(path.read_bytes()) for path in tmp_path.glob("jobs/*/failures/*.json")]
    bad = next(failure for failure in failures if failure["task"] == "train-00000001")
    assert bad["error"] == f"its worker died: {error}"
    assert traceback in bad["traceback"]
