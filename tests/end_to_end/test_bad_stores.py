"""Stores that can't be worked with: one clear line each, before anything is solved, and no secret anywhere."""

import json
import os
import time
import traceback

import pytest

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.store import Store
from limbeck.trainer.config import FitConfig
from limbeck.trainer.runs.place import RECORD, Place
from limbeck.trainer.runs.record import RunRecord, plain, where
from tests import servers
from tests.end_to_end.jobs import SMALL
from tests.exactly_once import every_file

s3fs = pytest.importorskip("s3fs")

GENERATE = f"generate --teacher builtin:gaussian {SMALL} --store"


@pytest.fixture
def told(capsys, monkeypatch):
    """Run a command that must fail: its one line. Nothing may be solved before that."""

    def never(*args, **options):
        raise AssertionError("it began to solve")

    monkeypatch.setattr("limbeck.pipeline.producer.solve_task", never)

    def run(words, code=1):
        assert main(COMMANDS, words.split()) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1, captured.err
        return captured.err

    return run


def test_a_store_of_another_schema_version(told, tmp_path):
    (tmp_path / "store.json").write_text(json.dumps({"schema_version": 1, "writer": "a", "single_writer": False}))
    line = told(f"{GENERATE} {tmp_path}")
    assert line.startswith(f"limbeck: {tmp_path}/store.json has schema version 1, this program reads 2: use the")
    assert os.listdir(tmp_path) == ["store.json"]


def test_a_bucket_that_does_not_exist(told, s3_environment):
    line = told(f"{GENERATE} s3://no-such-bucket/x")
    assert line.startswith("limbeck: s3://no-such-bucket/x: there is no such bucket: create it first")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(told, s3_environment, monkeypatch, name):
    monkeypatch.setenv(name, "WRONG-AND-SECRET")
    line = told(f"{GENERATE} s3://{servers.BUCKET}/x")
    assert "PermissionError" in line
    assert line.endswith("check the credentials and their rights\n")
    assert "WRONG-AND-SECRET" not in line


def test_an_unreachable_endpoint_is_told_in_seconds(told, s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers.free_ports(1)[0]}")
    started = time.monotonic()
    line = told(f"{GENERATE} s3://{servers.BUCKET}/x")
    assert "EndpointConnectionError: Could not connect" in line
    assert line.endswith("check the address, the network and the credentials\n")
    assert time.monotonic() - started < 30


SLASHED = "s3cr3t/with+slash"


@pytest.mark.parametrize(
    "words",
    [
        "status s3://AKIA:{}@no-such-bucket/x",
        "generate --teacher builtin:nowhere --count 10 --store s3://AKIA:{}@no-such-bucket/x",
        "generate --teacher builtin:gaussian --count 0 --store s3://AKIA:{}@no-such-bucket/x",
        "generate --teacher builtin:gaussian --count 10 --micro-batch 7 --store s3://AKIA:{}@no-such-bucket/x",
        "generate --teacher builtin:gaussian --count 10 --store s3://AKIA:{}@no-such-bucket/x --sotre 1",
        "verify s3://AKIA:{}@no-such-bucket/x?token=1",
        "verify ftp://AKIA:{}@no-such-bucket/x",
        "inspect s3://AKIA:{}@no-such-bucket/x surplus://AKIA:{}@y",
    ],
)
def test_a_refusal_never_shows_the_secret_of_a_uri(s3_environment, words, capsys):
    words = words.replace("{}", SLASHED).split()
    assert main(COMMANDS, words) in (1, 2)
    captured = capsys.readouterr()
    with pytest.raises(Exception, match=r".") as raised:  # --debug
        main(COMMANDS, [*words, "--debug"])
    shown = "".join(traceback.format_exception(raised.value))
    assert SLASHED not in captured.out + captured.err + shown


def test_a_secret_in_a_uri_works_and_is_nowhere(s3_environment, jobs, monkeypatch, capsys):
    """A whole job whose only credentials are in the URI: neither its words nor its documents have them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    folder = f"{servers.BUCKET}/secret"
    given = f"s3://{servers.KEY}:{servers.SECRET}@{folder}"
    assert jobs.run(given, "--workers", 2, "--debug") == 0, jobs.told()
    for words in ("status", "verify", "inspect"):
        assert main(COMMANDS, [words, given]) == 0
    heard = jobs.told() + capsys.readouterr().out
    assert f"s3://{folder}" in heard
    assert servers.SECRET not in heard
    store = Store(given)
    for path in every_file(store):
        assert servers.SECRET.encode() not in (store.read(path) or b""), path


def test_a_run_of_the_trainer_keeps_no_secret_of_its_stores(tmp_path):
    config = FitConfig(out=tmp_path, data=f"s3://AKIA:{SLASHED}@bucket/x", checkpoints=f"s3://AKIA:{SLASHED}@bucket/y")
    assert where(config.store)["data"] == "s3://***@bucket/x"
    place = Place(tmp_path, config.saving.checkpoints)
    RunRecord("run", plain(config), where(config.store), {}, place.store.uri).save(tmp_path)
    kept = (tmp_path / RECORD).read_text()
    assert "s3://bucket/y" in kept
    assert SLASHED not in kept
