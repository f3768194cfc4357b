"""What test_killed_fits.py starts: one process that forks fits and has them killed, so that torch is imported once.

    python -m tests.trainer.killed PLAN.json

PLAN.json: arguments (of a fit, without --out), folder, and one of
every (n)   one fit after another is killed at its 1st, (n + 1)-th, ... operation on a file of its run, and resumed;
blows (n)   one fit is killed n times, each after a random time, and resumed.
Prints, as JSON, how many were killed, and in which of them what was saved differs from an uninterrupted fit's.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS

SAVED = ("model", "best", "stages/2-step", "stages/1-step")
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")


def fit(arguments: list[str], out: Path, blow: int | None = None) -> int:
    """Fork a fit, which kills itself before its n-th operation on a file of `out`; its process."""
    child = os.fork()
    if child:
        return child
    if blow is not None:
        sys.addaudithook(Blow(out, blow))
    code = main(COMMANDS, ["fit", *arguments, "--out", str(out)])
    os._exit(code)


class Blow:
    """An audit hook: Python tells it of every file that is opened, moved, linked or removed, before it is."""

    def __init__(self, out: Path, number: int) -> None:
        self.out, self.left = str(out), number

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in EVENTS and any(str(one).startswith(self.out) for one in arguments[:2]):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1


def ended(child: int) -> int:
    """Its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def saved(out: Path) -> dict:
    """The bytes of every model, and the steps and losses of the log."""
    files = {name: out / name / "model.safetensors" for name in SAVED}
    found = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found | {"steps": [line["step"] for line in lines], "lr": [line.get("lr") for line in lines]}


def at_every(arguments: list[str], folder: Path, every: int, whole: dict) -> tuple[int, list]:
    wrong, killed = [], 0
    for number in itertools.count(0, every):
        out = folder / f"killed-at-{number}"
        code = ended(fit(arguments, out, number))
        if code == 0:
            return killed, wrong
        killed += code == -signal.SIGKILL
        if code != -signal.SIGKILL or ended(fit(arguments, out)) != 0 or saved(out) != whole:
            wrong.append(number)


def at_random(arguments: list[str], folder: Path, blows: int, seconds: float, whole: dict) -> tuple[int, list]:
    """Each blow falls within a third of a whole fit's time, so that the run gets on between them."""
    generator, out, killed = random.Random(0), folder / "killed", 0
    for _ in range(blows):
        child = fit(arguments, out)
        time.sleep(generator.uniform(0, seconds / 3))
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
    right = ended(fit(arguments, out)) == 0 and saved(out) == whole
    return killed, [] if right else ["at random"]


def run(plan: dict) -> dict:
    folder, arguments = Path(plan["folder"]), plan["arguments"]
    began = time.monotonic()
    if ended(fit(arguments, folder / "whole")) != 0:
        sys.exit("the uninterrupted fit has failed")
    seconds, whole = time.monotonic() - began, saved(folder / "whole")
    if "every" in plan:
        killed, wrong = at_every(arguments, folder, plan["every"], whole)
    else:
        killed, wrong = at_random(arguments, folder, plan["blows"], seconds, whole)
    return {"killed": killed, "wrong": wrong, "models": len(whole) - 2}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
