"""What a log shows of a job: a line an interval, whether or not a task ends in it."""

import time

from limbeck.pipeline.job.progress import Progress
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.job import Failure


def test_a_log_gets_a_line_an_interval_and_none_after_the_end(capsys):
    with Progress(3, interval=0.05) as progress:
        time.sleep(0.3)
        progress.count(Commit.model_construct(rows=128))
        failed = {"task": "train-00000001", "error": "ValueError: no", "traceback": "", "machine": "m"}
        progress.count(Failure(attempts=3, failed_at="2026-01-01T00:00:00+00:00", **failed))
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0/3 tasks, 0 samples, 0 samples/s, 0 failures, no estimate yet"
    assert "train-00000001 set aside after 3 attempts: ValueError: no" in lines
    assert lines[-1].startswith("1/3 tasks, 128 samples, ")
    assert "1 failures" in lines[-1]
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
