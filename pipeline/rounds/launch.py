"""The trainer, started by command line: a process, whatever runs it, or a job on a Ray cluster. Never by import."""

import ctypes
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from limbeck.diffusion.models.checkpoint import MODEL_FILE
from limbeck.pipeline.rounds.config import RAY_JOB, ProgressiveConfig
from limbeck.pipeline.rounds.plan import Round
from limbeck.pipeline.workers.submission import ENDED_BADLY, Submission, hand_in, wait_for
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.errors import UsageError, UserError
from limbeck.storage_schemas.log import log

_STDERR = 2
_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class TrainerFailed(UserError):
    """A fit that did not come to its end."""


def fit(config: ProgressiveConfig, part: Round, *, lock: int) -> None:
    """Run a round's fit to its end, or go on with it. TrainerFailed in one line.

    A signal is passed on to a process, and its end waited for; a job goes on without us. lock: a descriptor that the
    process holds open as long as it lives.
    """
    launch = shlex.split(config.launch)
    if launch[0] == RAY_JOB:
        _as_job(config, [*(launch[1:] or ["python", "-m", "limbeck.trainer"]), *part.fit], part)
    else:
        _as_process([*_this_python(launch), *part.fit], part, lock)


def evaluate(words: Sequence[str]) -> Any:
    """What `limbeck evaluate WORDS --json` prints, in a process here."""
    command = [sys.executable, "-m", "limbeck.trainer", "evaluate", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=_STDERR, preexec_fn=_end_with_parent) as process:
        text, _ = _heeding_signals(process, process.communicate)
    if process.returncode:
        raise TrainerFailed(f"`{shlex.join(command[1:])}` {_ended(process.returncode)}; the same command goes on there")
    return json.loads(text)


def _as_process(command: Sequence[str], part: Round, lock: int) -> None:
    # Its words go where ours go; stdout is for the report.
    try:
        # A group of its own: Ctrl-C reaches it through us, once, as torchrun drops its workers at a second signal.
        process = subprocess.Popen(
            command, stdout=_STDERR, pass_fds=(lock,), process_group=0, preexec_fn=_end_with_parent
        )
    except OSError as error:
        raise TrainerFailed(f"{command[0]} can't be started ({error}): mend --launch") from None
    with process:
        code = _heeding_signals(process, process.wait)
    if code:
        way = "mend --fit.*" if code == UsageError.exit_code else "the same command goes on there"
        raise TrainerFailed(f"{part.name}: the trainer {_ended(code)}; {way}")
    if not _is_fitted(part):
        raise TrainerFailed(f"{part.name}: the trainer has ended, but there is no {part.student}: mend --launch")


def _heeding_signals(process: "subprocess.Popen[bytes]", wait: Callable[[], Any]) -> Any:
    """Wait for the process's end. A signal to us ends it, too: it saves first, and a second one kills it."""
    try:
        return wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
        raise


def _as_job(config: ProgressiveConfig, command: Sequence[str], part: Round) -> None:
    """A job whose id says what it fits: a driver that comes again finds the one that is under way."""
    from limbeck.pipeline.workers.ray_runner import job_client  # only this needs Ray

    client = job_client(config.dashboard)
    name = f"limbeck-progressive-{part.steps}-{digest(list(command))[:12]}"
    receipt = hand_in(client, Submission(name, shlex.join(command)), {})
    log.info(f"{part.name}: job {receipt.submission_id} is {receipt.status}")
    receipt = wait_for(client, receipt)
    print(client.get_job_logs(receipt.submission_id), end="", file=sys.stderr)
    if receipt.status in ENDED_BADLY:
        raise TrainerFailed(
            f"{part.name}: job {receipt.submission_id} is {receipt.status}: the same command tries again"
        )
    if not _is_fitted(part):
        problem = f"{part.name}: job {receipt.submission_id} has ended, but there is no {part.student}"
        way = f"let the cluster write there, or `ray job delete {receipt.submission_id}` if it was removed since"
        raise TrainerFailed(f"{problem}: {way}")


def _is_fitted(part: Round) -> bool:
    return (part.student / MODEL_FILE).is_file()


def _this_python(launch: Sequence[str]) -> list[str]:
    return [sys.executable if launch[0] == "python" else launch[0], *launch[1:]]


def _end_with_parent() -> None:
    """Have Linux ask the trainer to end, and so to save, if its driver dies without a word."""
    if sys.platform == "linux":
        _libc.prctl(_PDEATHSIG, signal.SIGTERM)


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def device_of(config: ProgressiveConfig) -> list[str]:
    """The device option of fits, for what is measured beside them; on a cluster that is another machine's."""
    device = None if shlex.split(config.launch)[0] == RAY_JOB else config.fit_options.get("device")
    return ["--device", *device] if device else []
