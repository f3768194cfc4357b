"""What test_sleeps.py shows of simulated programs holds of real ones: SIGSTOP at any step, days, SIGCONT."""

import json
import os
import subprocess
import sys

import pytest

from tests import servers


def play(uri, *, seed, rounds, **environment):
    words = [sys.executable, "-m", "tests.pipeline.stopped", str(uri), str(seed), str(rounds)]
    told = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, check=True)
    return json.loads(told.stdout)


@pytest.mark.faults
def test_stopped_in_a_folder(tmp_path):
    told = play(tmp_path, seed=1, rounds=5)
    assert told["wrong"] == []
    assert told["stopped"] >= 3


@pytest.mark.faults
def test_stopped_on_s3(tmp_path):
    with servers.seaweed(tmp_path) as server:
        told = play(f"s3://{servers.BUCKET}/stopped", seed=2, rounds=1, STOPPED_HOUR="1", **server.environment)
    assert told["wrong"] == []
    assert told["stopped"] >= 1
