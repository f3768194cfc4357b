"""Real drivers and prunes that SIGSTOP stops at any step, on a clock on which an hour is a fraction of a second.

python -m tests.pipeline.stopped URI SEED ROUNDS prints {"stopped": how often, "wrong": [...]} as JSON. Each command is
a fork of this process, which never touches the store itself, so that many of them fit into a minute.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import limbeck.pipeline.job.heartbeat
from limbeck.storage_schemas import backends, clock
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.store import Store

HOUR = float(os.environ.get("STOPPED_HOUR", "0.25"))
"""Seconds. Between two deletions a prune must take less than 50 minutes of it."""

HELD_UP = 5
"""How often a prune may be in a row."""

BEGAN = datetime.now(UTC)
DATASETS = ("main", "other")


def simulated(real):
    """The time on the clock of all programs and of the storage."""
    return BEGAN + (real - BEGAN) * (3600 / HOUR)


class Simulated(datetime):
    """In the place of datetime."""

    @classmethod
    def now(cls, tz=None):
        return simulated(datetime.now(tz))


def simulate_time():
    """For the programs, their heartbeats, and what the storage says of files.

    S3 says it to the second, which is hours here: there it isn't compared with the clock.
    """
    listed, modified = backends.modified, Store.modified

    def of_entry(entry):
        return None if (real := listed(entry)) is None else simulated(real)

    def of_file(store, path):
        real = modified(store, path) if store.protocol == "file" else None
        return None if real is None else simulated(real)

    clock.datetime, backends.modified, Store.modified = Simulated, of_entry, of_file
    limbeck.pipeline.job.heartbeat.Pulse.__init__.__kwdefaults__["every"] = (
        limbeck.pipeline.job.heartbeat.EVERY * HOUR / 3600
    )


def stop_before(step):
    """Have this process stop itself before its step-th operation on the store, counted from 1."""
    count = iter(range(1, 10**9))

    def stopping(operation):
        def operate(store, *given, **named):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGSTOP)
            return operation(store, *given, **named)

        return operate

    for name in ("put_if_absent", "write", "upload", "remove", "read", "list", "list_details", "size"):
        setattr(Store, name, stopping(getattr(Store, name)))


def start(log, *words, step=0):
    """A command in a process of its own, its output at the end of `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        simulate_time()
        stop_before(step)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = main(COMMANDS, [str(word) for word in words])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid):
    """The exit code of a process that ends, None of one that stops."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


class Round:
    """A store of two datasets, a command that is stopped, what others do meanwhile, and what is wrong after it."""

    def __init__(self, uri, log, rng):
        self.uri, self.log, self.rng = uri, log, rng
        self.wrong = []

    def words(self, kind):
        """A prune without a grace; a driver of main that slides on; one of another dataset, which begins at 0."""
        made = "--teacher builtin:gaussian --runner local --samples-per-shard 8 --micro-batch 8 --solver.name ddim"
        driver = [*made.split(), "--solver.steps", 2, "--holdout", 8, "--store", self.uri]
        return {
            "prune": ["prune", self.uri, "--keep-manifests", 1, "--grace", "0m"],
            "slide": ["regenerate", *driver, "--count", 32, "--refresh", "0.5"],
            "other": ["generate", *driver, "--count", 32, "--dataset", "other"],
        }[kind]

    def run(self, kind):
        """A prune that this machine held up for most of an hour says that it is to be run again."""
        for _ in range(HELD_UP if kind == "prune" else 1):
            before = self.log.stat().st_size if self.log.exists() else 0
            if wait(start(self.log, *self.words(kind))) == 0:
                return
            if "held up" not in self.log.read_text()[before:]:
                break
        self.wrong.append(f"{kind} failed")

    def sleep(self, hours):
        time.sleep(hours * HOUR)

    def verify(self, datasets):
        for name in datasets:
            if wait(start(self.log, "verify", self.uri, "--dataset", name)) != 0:
                self.wrong.append(f"{name} is broken")

    def play(self):
        """Whether the command was stopped: it has fewer steps than it might have."""
        self.run("slide")
        self.run("slide")
        self.sleep(3)
        self.run("prune")
        self.sleep(1)
        kind = self.rng.choice(["prune", "slide", "other"])
        sleeper = start(self.log, *self.words(kind), step=self.rng.randint(1, 80))
        if wait(sleeper) is not None:
            return False
        for hours, other in ((3, "prune"), (3, "prune"), (0, "other"), (1, "slide"), (28, "prune"), (2, "prune")):
            self.sleep(hours)
            self.run(other)
        self.verify(DATASETS)
        os.kill(sleeper, signal.SIGCONT)
        if wait(sleeper) not in (0, 1):
            self.wrong.append(f"{kind} ended otherwise than done or refused")
        self.verify(DATASETS)
        self.sleep(3)
        for last in ("prune", "other", "slide", "prune"):
            self.run(last)
        self.verify(DATASETS)
        return True


def main_program(uri, seed, rounds):
    """Play so many rounds; their logs go with them where nothing is wrong."""
    torch.set_num_threads(1)
    rng, stopped, wrong = random.Random(int(seed)), 0, []
    for number in range(int(rounds)):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            played = Round(f"{uri}/{number}", log, rng)
            stopped += played.play()
            told = log.read_text()
            found = [*played.wrong, *(["a traceback"] if "Traceback" in told else [])]
            wrong += [[number, found, told[-3000:]]] if found else []
    print(json.dumps({"stopped": stopped, "wrong": wrong}))


if __name__ == "__main__":
    main_program(*sys.argv[1:])
