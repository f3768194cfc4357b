"""The id of a submission says what it makes and nothing of where; a double submit is refused, a rerun is not."""

import re
from types import SimpleNamespace

import pytest

from limbeck.pipeline.workers import submission as submission_module
from limbeck.pipeline.workers.submission import Receipt, Submission, hand_in, submission_of, wait_for
from limbeck.storage_schemas.errors import UsageError, UserError

LINE = ["generate", "--teacher", "builtin:digits", "--store", "s3://bucket/store", "--count", "100"]


class JobServer:
    """Refuses an id that it knows, as Ray's does."""

    def __init__(self, agents_after=0, **known):
        self.agents_after = agents_after
        self.jobs = {name.replace("_", "-"): status for name, status in known.items()}
        self.asked = []

    def submit_job(self, *, entrypoint, submission_id, runtime_env):
        self.asked.append((submission_id, runtime_env))
        if len(self.asked) <= self.agents_after:
            raise RuntimeError("status code 500: No available agent to submit job, please try again later.")
        if submission_id in self.jobs:
            raise RuntimeError(f"status code 500: Job with submission_id {submission_id} already exists.")
        self.jobs[submission_id] = "PENDING"
        return submission_id

    def get_job_info(self, job_id):
        if job_id not in self.jobs:
            raise RuntimeError(f"Job {job_id} does not exist")
        return SimpleNamespace(status=self.jobs[job_id], driver_exit_code=3)


def test_an_id_says_what_is_made_and_not_where():
    first = submission_of(LINE).submission_id
    assert re.fullmatch(r"limbeck-generate-[0-9a-f]{12}", first)
    elsewhere = ["--workers", "8", "--ray.num-gpus", "0.5", "--threads", "4", "--device", "cuda", "--max-attempts", "9"]
    assert submission_of([*LINE, *elsewhere]).submission_id == first
    others = [["--count", "101"], ["--seed", "1"], ["--store", "s3://bucket/other"], ["--solver.steps", "8"]]
    ids = {submission_of([*LINE, *words]).submission_id for words in others}
    assert len(ids | {first}) == 5


def test_a_cluster_that_begins_is_asked_again_until_it_has_an_agent(monkeypatch):
    monkeypatch.setattr(submission_module, "POLL_SECONDS", 0.0)
    server = JobServer(agents_after=3)
    assert hand_in(server, submission_of(LINE), {}).submitted
    assert len(server.asked) == 4
    monkeypatch.setattr(submission_module, "AGENT_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"the job server refused .*No available agent"):
        hand_in(JobServer(agents_after=1), submission_of(LINE), {})


def test_a_tick_is_part_of_the_id_and_a_schedule_needs_one():
    line = ["regenerate", *LINE[1:]]
    ids = [submission_of([*line, "--tick", f"2026-11-22T0{hour}"]).submission_id for hour in (3, 4)]
    assert [name.rpartition("-2026-")[2] for name in ids] == ["11-22T03", "11-22T04"]
    assert len({name.partition("-2026")[0] for name in ids}) == 1
    with pytest.raises(UsageError, match="regenerate without --tick would be one submission for ever"):
        submission_of(line)


def test_the_configuration_file_is_read_here(tmp_path):
    (tmp_path / "job.yaml").write_text("teacher: builtin:digits\nstore: s3://bucket/store\nray: {num_gpus: 0.5}\n")
    submission = submission_of(["generate", "--config", str(tmp_path / "job.yaml"), "--count", "100"])
    assert submission.submission_id == submission_of(LINE).submission_id
    assert submission.entrypoint == (
        "python -m limbeck.pipeline generate --count 100 --teacher=builtin:digits --store=s3://bucket/store "
        "--ray.num-gpus=0.5"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "can't be submitted"),
        (["progressive", "--store", "s3://bucket/store"], "run it where both are, with --runner ray"),
        (["verify", "s3://bucket/store"], "'verify' can't be submitted"),
        ([*LINE, "--count", "0"], "count"),
        ([*LINE, "--store", "s3://key:secret@bucket/store"], "give credentials by environment"),
    ],
)
def test_what_can_not_be_submitted_is_refused(words, told):
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        submission_of(words)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "SUCCEEDED"])
def test_what_is_under_way_or_done_is_not_submitted_again(status):
    server = JobServer(a=status)
    receipt = hand_in(server, Submission("a", "python"), {})
    assert (receipt.submitted, receipt.status, server.asked) == (False, status, [("a", {})])


def test_a_rerun_after_a_failure_gets_the_next_id():
    server = JobServer(a="FAILED", a_r1="STOPPED")
    receipt = hand_in(server, Submission("a", "python"), {"working_dir": "."})
    assert (receipt.submission_id, receipt.submitted) == ("a-r2", True)
    assert server.asked[-1] == ("a-r2", {"working_dir": "."})
    assert hand_in(server, Submission("a", "python"), {"working_dir": "."}).submitted is False


def test_another_refusal_is_told():
    def refuse(**given):
        raise RuntimeError("status code 500: no room\nTraceback")

    server = JobServer()
    server.submit_job = refuse
    with pytest.raises(UserError, match="the job server refused a: status code 500: no room Traceback"):
        hand_in(server, Submission("a", "python"), {})


def test_the_exit_code_is_the_jobs_own():
    server = JobServer(a="FAILED", b="SUCCEEDED")
    codes = {name: wait_for(server, Receipt(name, "python", False, "RUNNING")).exit_code for name in "ab"}
    assert codes == {"a": 3, "b": 0}


def test_a_job_that_the_server_forgot_is_one_line():
    with pytest.raises(UserError, match="doesn't know c any more: submit again"):
        wait_for(JobServer(), Receipt("c", "python", True, "PENDING"))


def test_a_dry_run_prints_the_id_and_the_command(pipeline):
    code, out, _ = pipeline("submit", "--dry-run", "--", *LINE)
    assert (code, out) == (
        0,
        f"ray job submit --submission-id {submission_of(LINE).submission_id} -- "
        + ("python -m limbeck.pipeline " + " ".join(LINE) + "\n"),
    )


def test_a_server_that_is_not_there_is_one_line(pipeline):
    code, _, err = pipeline("submit", "--dashboard", "http://127.0.0.1:9", "--", *LINE)
    assert (code, err.count("\n")) == (2, 1)
    assert "no Ray job server at http://127.0.0.1:9" in err
