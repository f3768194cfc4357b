"""`submit`: a run as a Ray job whose id says what it makes, so that Ray itself refuses to run it twice."""

import itertools
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from limbeck.pipeline.config import GenerateConfig, RegenerateConfig, SubmitConfig
from limbeck.storage_schemas.canonical import digest
from limbeck.storage_schemas.command_line import parse, spelled_out
from limbeck.storage_schemas.errors import UsageError, UserError, without_credentials

PARTS = ("diffusion", "pipeline", "storage_schemas", "trainer")
"""Folders of a clone that are installed as limbeck.diffusion, and so on."""

SUBMITTABLE: dict[str, type[GenerateConfig]] = {"generate": GenerateConfig, "regenerate": RegenerateConfig}

WHERE_AND_HOW = {
    *("runner", "workers", "threads", "device", "ray"),
    *("max_attempts", "straggler_seconds", "drain_seconds", "as_json", "tick"),
}
"""Fields that don't change what is made. The tick stands in the id by itself."""

ENDED_BADLY = ("FAILED", "STOPPED")
ENDED = ("SUCCEEDED", *ENDED_BADLY)
POLL_SECONDS = 2.0

AGENT_SECONDS = 60.0
"""A cluster that has just begun answers before it has an agent that starts jobs."""


class JobClient(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def get_job_logs(self, job_id: str) -> str: ...


@dataclass(frozen=True)
class Submission:
    """What is asked of the job server."""

    submission_id: str
    entrypoint: str


@dataclass(frozen=True)
class Receipt:
    """What came of it: `submitted` says whether that was now, or by somebody before."""

    submission_id: str
    entrypoint: str
    submitted: bool
    status: str
    exit_code: int | None = None


def run_submit(config: SubmitConfig) -> int:
    """0 where the job is under way or done, by this submit or an earlier one; with --wait the job's own exit code."""
    submission = submission_of(config.command)
    if config.dry_run:
        print(json.dumps(asdict(submission)) if config.as_json else _shown(submission))
        return 0
    from limbeck.pipeline.workers.ray_runner import job_client  # the id alone needs no Ray

    client = job_client(config.dashboard)
    with runtime_env(config.working_dir) as environment:
        receipt = hand_in(client, submission, environment)
    if not config.as_json:
        print(_describe(receipt), flush=True)
    if config.wait:
        receipt = wait_for(client, receipt)
        print(client.get_job_logs(receipt.submission_id), end="", file=sys.stderr if config.as_json else sys.stdout)
    if config.as_json:
        print(json.dumps(asdict(receipt)))
    return receipt.exit_code or 0


def submission_of(words: Sequence[str]) -> Submission:
    """The id and the command of a line such as `generate --config digits.yaml --workers 8`.

    The file is read here and its fields become flags: the cluster needs no copy of it, and runs what was named.
    """
    name, *options = words or ("",)
    if name == "progressive":
        raise UsageError(
            "progressive starts a trainer and keeps students in a folder: run it where both are, with --runner ray "
            "and --launch 'ray-job python -m limbeck.trainer' for work on the cluster"
        )
    if name not in SUBMITTABLE:
        raise UsageError(f"{name!r} can't be submitted: write -- generate ... or -- regenerate ... at the end")
    flags = spelled_out(SUBMITTABLE[name], options)
    config = parse(SUBMITTABLE[name], flags, program=f"limbeck {name}")
    entrypoint = shlex.join(["python", "-m", "limbeck.pipeline", name, *flags])
    if without_credentials(entrypoint) != entrypoint:
        raise UsageError(
            "a submitted command is shown in Ray's dashboard: give credentials by environment, not in a uri"
        )
    return Submission(submission_id(name, config), entrypoint)


def submission_id(name: str, config: GenerateConfig) -> str:
    """limbeck-regenerate-1f2e3d4c5b6a-2026-11-22T03: the command, what it makes, and the schedule's tick."""
    makes = digest({"command": name, **config.model_dump(mode="json", exclude=WHERE_AND_HOW)})
    tick = getattr(config, "tick", None)
    if name == "regenerate" and tick is None:
        raise UsageError(
            "regenerate without --tick would be one submission for ever: say which one it is, "
            "such as --tick $(date -u +%Y-%m-%dT%H)"
        )
    return "-".join(["limbeck", name, makes[:12], *([re.sub(r"[^\w-]", "", tick)] if tick else [])])


@contextmanager
def runtime_env(working_dir: str | None) -> Iterator[dict[str, Any]]:
    """Ray's runtime environment of a job that runs in a folder, which Ray copies to the cluster.

    Where the folder is a clone of this project, the job runs the clone's code: its folders travel as the package
    `limbeck`, before one that is installed there.
    """
    if working_dir is None:
        yield {}
    elif not all(Path(working_dir, part, "__init__.py").is_file() for part in PARTS):
        yield {"working_dir": working_dir}
    else:
        with tempfile.TemporaryDirectory() as folder:
            for part in PARTS:
                shutil.copytree(
                    Path(working_dir, part),
                    Path(folder, "limbeck", part),
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            # Ray names what it uploads by its files: of a clone with no others, these would be the working_dir's.
            Path(folder, "limbeck", "py.typed").touch()
            yield {"working_dir": working_dir, "py_modules": [str(Path(folder, "limbeck"))]}


def hand_in(client: JobClient, submission: Submission, runtime_env: dict[str, Any]) -> Receipt:
    """Submit under the first id that is free: -r1, -r2, ... where earlier ones failed or were stopped.

    Two that do this at once ask for the same id, and the job server refuses one of them.
    """
    for rerun in itertools.count():
        name = submission.submission_id + (f"-r{rerun}" if rerun else "")
        try:
            _submit(client, entrypoint=submission.entrypoint, submission_id=name, runtime_env=runtime_env)
            return Receipt(name, submission.entrypoint, True, "PENDING")
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise UserError(f"the job server refused {name}: {' '.join(str(error).split())[:500]}") from None
        status, _ = _state(client, name)
        if status not in ENDED_BADLY:
            return Receipt(name, submission.entrypoint, False, status)
    raise AssertionError("counting ended")


def _submit(client: JobClient, **job: Any) -> None:
    """Ask until the cluster has an agent that starts jobs, for at most AGENT_SECONDS."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() >= deadline:
                raise
        time.sleep(POLL_SECONDS)


def wait_for(client: JobClient, receipt: Receipt) -> Receipt:
    """The receipt with the job's end: the exit code of its driver, 1 where it had none."""
    while (state := _state(client, receipt.submission_id))[0] not in ENDED:
        time.sleep(POLL_SECONDS)
    status, driver_exit_code = state
    code = 0 if status == "SUCCEEDED" else driver_exit_code or 1
    return Receipt(receipt.submission_id, receipt.entrypoint, receipt.submitted, status, code)


def _state(client: JobClient, name: str) -> tuple[str, int | None]:
    """A job's status and the exit code of its driver."""
    try:
        info = client.get_job_info(name)
    except RuntimeError:  # its cluster was started again, or somebody deleted it
        raise UserError(f"the job server doesn't know {name} any more: submit again, what is done is kept") from None
    return str(getattr(info.status, "value", info.status)), info.driver_exit_code


def _describe(receipt: Receipt) -> str:
    if receipt.submitted:
        return f"submitted {receipt.submission_id}"
    again = f"; `ray job delete {receipt.submission_id}` lets it run again" if receipt.status == "SUCCEEDED" else ""
    return f"{receipt.submission_id} was submitted before and is {receipt.status}: not submitted again{again}"


def _shown(submission: Submission) -> str:
    return f"ray job submit --submission-id {submission.submission_id} -- {submission.entrypoint}"
