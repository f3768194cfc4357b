"""Real `generate` jobs as processes of their own, with teachers that tests/pipeline keeps."""

import os
import subprocess
import sys
import time
from pathlib import Path

STRANGE = Path(__file__).parents[1] / "pipeline"
COUNT, HOLDOUT = 160, 40
SMALL = (
    "--solver.steps 4 --states 2 --samples-per-shard 64 --micro-batch 32 "
    f"--count {COUNT} --holdout {HOLDOUT} --runner local"
)
"""3 train tasks and 1 holdout task."""

SABOTAGED = "python:strange_teachers:sabotaged_teacher"


class Jobs:
    """Processes that are killed at the end if they still run."""

    def __init__(self, log):
        self.log, self.started = log, []

    def start(self, store, *words, teacher="builtin:gaussian", before=(), **environment):
        command = f"{sys.executable} -m limbeck.pipeline generate --teacher {teacher} --store {store} {SMALL}".split()
        path = os.pathsep.join(filter(None, [str(STRANGE), os.environ.get("PYTHONPATH")]))
        with open(self.log, "ab") as out:
            process = subprocess.Popen(
                [*before, *command, *map(str, words)],
                env=os.environ | {"PYTHONPATH": path} | environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def run(self, *args, **options):
        """The exit code; -9 for a driver that was killed."""
        return self.start(*args, **options).wait()

    def told(self):
        """All that the jobs have said."""
        return self.log.read_text()

    def end(self):
        for process in self.started:
            process.kill()
            process.wait()


def wait_for(true, seconds=90):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
