"""A function once, elsewhere: what it returns, what it raises, and what is left when its process dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from limbeck.pipeline.config import ResolveConfig
from limbeck.pipeline.workers.crossing import WorkerDied
from limbeck.pipeline.workers.one_call import run_once
from limbeck.storage_schemas.errors import UserError

HERE = ResolveConfig(store="unused", runner="local")


def test_a_function_runs_in_a_process_of_its_own():
    import strange_work

    number, pid = run_once(strange_work.where, 41, runner=HERE)
    assert (number, pid != os.getpid()) == (42, True)


def test_its_exception_is_raised_here():
    import strange_work

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        run_once(strange_work.out_of_memory, runner=HERE)
    assert "strange_work.py" in caught.value.__notes__[0]


def test_an_exception_that_can_not_cross_is_one_line():
    import strange_work

    with pytest.raises(UserError, match="Unfit: 7: no such thing"):
        run_once(strange_work.unfit, runner=HERE)


def test_a_process_that_is_killed_leaves_this_one_alone():
    import strange_work

    with pytest.raises(WorkerDied, match=r"killed died: exit code -9, SIGKILL \(perhaps out of memory"):
        run_once(strange_work.killed, runner=HERE)


@pytest.mark.faults
def test_the_process_ends_with_a_parent_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from limbeck.pipeline.config import ResolveConfig\nfrom limbeck.pipeline.workers.one_call import run_once\n"
        "import strange_work\n"
        "if __name__ == '__main__':\n"
        f"    run_once(strange_work.sleep, {str(tmp_path / 'pid')!r}, runner=ResolveConfig(store='unused'))\n"
    )
    inherited = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), inherited])
    parent = subprocess.Popen([sys.executable, program], env=os.environ | {"PYTHONPATH": paths})
    child = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not is_alive(child))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
