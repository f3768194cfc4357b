"""One fit at a time in a place of checkpoints: a second is refused, and one that was killed locks nobody out."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import timedelta

import pytest

from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.errors import UsageError
from limbeck.storage_schemas.program import COMMANDS
from limbeck.storage_schemas.store import Store
from limbeck.trainer.runs import claim
from limbeck.trainer.runs.claim import FITS, Claim, FitAtWork, TakenOver
from limbeck.trainer.runs.place import Place
from tests.servers import moto
from tests.trainer.test_fits_on_ranks import TINY

LAPSES = 1.0


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """A bucket in memory, and a fit's times a sixtieth of what they are."""
    for name, seconds in (("_RENEWED", LAPSES / 6), ("_LAPSES", LAPSES), ("_LOOKS", LAPSES / 60)):
        monkeypatch.setattr(claim, name, seconds)
    return Store(f"memory://claim/{tmp_path.name}")


def left(place: Store, *, process: str = "", number: int = 1, **more) -> None:
    """The claim of a fit that was killed; on another machine unless told of a process."""
    place.write(f"{FITS}/{number:06d}.json", FitAtWork(attempt="0" * 16, process=process, **more).to_bytes())


def taken(place: Store) -> tuple[int, float]:
    """(number of the claim, seconds until it was had)."""
    began = time.monotonic()
    with Claim(place) as held:
        return held._number, time.monotonic() - began


def test_a_second_is_refused_while_the_first_is_at_work_and_not_after_it(place):
    with Claim(place) as first:
        for _ in range(2):
            with pytest.raises(UsageError, match=r"another fit keeps its checkpoints in .*; wait for it, or choose"):
                taken(place)
        time.sleep(1.5 * LAPSES)  # of a fit that lasts
        with pytest.raises(UsageError):
            taken(place)
        first.check()
    number, seconds = taken(place)
    assert (number, seconds < LAPSES / 2) == (2, True)
    assert place.list(FITS) == ["000002.json"]


def gone() -> str:
    """A process of this machine that was there."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = claim._process(child.pid)
    assert not claim._is_gone(process)
    child.kill()
    child.wait()
    return process


def test_one_whose_process_is_gone_is_taken_over_at_once(place):
    left(place, process=gone())
    number, seconds = taken(place)
    assert (number, seconds < LAPSES / 2) == (2, True)


def test_a_process_number_that_another_has_now_is_not_the_one(place):
    *here, _ = claim._this_process().split("/")
    assert claim._is_gone("/".join([*here, "1"]))
    assert not claim._is_gone(claim._this_process())


@pytest.mark.parametrize("process", ["", "x", "a/b/1/2", "a/b/../2", "a/b/c/d/e"])
def test_what_cannot_be_told_of_another_machine_is_not_taken_for_gone(process):
    assert not claim._is_gone(process)


def test_one_of_another_machine_is_waited_for_until_it_lapses(place, capsys):
    left(place)
    number, seconds = taken(place)
    assert number == 2
    assert 0.8 * LAPSES < seconds < 3 * LAPSES
    assert "is a fit's that may be at work yet: waiting up to 1 s" in capsys.readouterr().err


def test_one_that_is_old_by_the_storages_clock_is_taken_over_at_once(place, monkeypatch):
    left(place)
    listed = Store.list_details

    def older(self, folder, **more):
        return [
            one if one.name.startswith("look") else type(one)(one.name, one.size, one.modified - timedelta(minutes=2))
            for one in listed(self, folder, **more)
        ]

    monkeypatch.setattr(Store, "list_details", older)
    assert taken(place)[1] < LAPSES / 2


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"attempt": 5}'])
def test_what_is_no_claim_lapses(place, data):
    place.write(f"{FITS}/000041.json", data)
    assert taken(place)[0] == 42


@pytest.mark.parametrize("name", ["x.json", "000009", "look-1", "٣٣٣٣٣٣.json"])
def test_other_names_are_left_alone(place, name):
    place.write(f"{FITS}/{name}", b"mine")
    assert taken(place)[0] == 1
    assert name in place.list(FITS)


def test_one_that_slept_stops_before_it_writes_and_never_takes_back(place):
    with ExitStack() as held:
        slept = held.enter_context(Claim(place))
        slept._ended.set()  # no renewal, as where all of a process is stopped
        slept._renewal.join()
        slept._process = ""
        left(place)
        other = held.enter_context(Claim(place))
        with pytest.raises(TakenOver, match=r"another fit goes on in memory://claim/.*; nothing is written any more"):
            slept.check()
        place.write(claim._path(slept._number), slept._document(beats=9).to_bytes())  # a renewal that was under way
        other.check()
    assert max(place.list(FITS)) == "000002.json"


def test_of_many_who_come_at_once_one_holds(place):
    left(place, ended=True)
    barrier, won, refused, done = threading.Barrier(6), [], [], threading.Event()

    def come() -> None:
        barrier.wait()
        try:
            with Claim(place) as one:
                won.append(one)
                done.wait(20)
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(refused) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)


def fit(store, out, place, *options) -> int:
    words = ["fit", "--data", store.uri, "--out", str(out), *TINY, "--steps", "4", "--checkpoints", place, *options]
    return main(COMMANDS, words)


@pytest.mark.parametrize("where", ["memory://fits{}", "{}/place"])
@pytest.mark.parametrize("option", ["--resume", "--no-resume"])
def test_a_fit_refuses_a_place_where_another_is_at_work(make_store, tmp_path, monkeypatch, capsys, where, option):
    monkeypatch.setattr(claim, "_RENEWED", 0.1)
    monkeypatch.setattr(claim, "_LOOKS", 0.05)
    store, uri = make_store(), where.format(tmp_path)
    assert fit(store, tmp_path / "first", uri) == 0
    names = Store(uri).list("checkpoints")
    with Place(tmp_path / "first", uri).held():
        assert fit(store, tmp_path / "second", uri, option) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"limbeck: another fit keeps its checkpoints in {uri}; wait for it, or choose another")
    assert not (tmp_path / "second/run.json").exists()
    assert Store(uri).list("checkpoints") == names
    assert fit(store, tmp_path / "second", uri) == 0


def test_a_fit_that_was_taken_over_ends_in_a_line(make_store, tmp_path, monkeypatch, capsys):
    uri = f"memory://taken/{tmp_path.name}"

    def put(self, name, before=Place.put):
        if name == "metrics.jsonl":
            left(Store(uri), number=7)
        before(self, name)

    monkeypatch.setattr(Place, "put", put)
    assert fit(make_store(), tmp_path / "out", uri) == 1
    assert "limbeck: another fit goes on in memory://taken/" in capsys.readouterr().err
    assert Store(uri).list("checkpoints") == []


@pytest.mark.parametrize("bucket", [moto], indirect=True)
def test_on_s3_it_is_the_same(bucket, monkeypatch):
    monkeypatch.setattr(claim, "_RENEWED", 0.3)
    monkeypatch.setattr(claim, "_LOOKS", 0.1)
    place = Store(f"{bucket}/runs/held-{os.getpid()}")
    with Claim(place), pytest.raises(UsageError, match="another fit keeps its checkpoints in s3://"):
        taken(place)
    assert taken(place)[0] == 2
