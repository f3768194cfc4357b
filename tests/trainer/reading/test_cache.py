"""The disk cache: its limit, its order, and what killed writers, several processes and a full disk do to it."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from limbeck.storage_schemas.ranges import checksum
from limbeck.trainer.reading import cache as cache_module
from limbeck.trainer.reading.cache import TOUCH, Cache
from limbeck.trainer.reading.mapped import Maps


def open_cache(folder: Path, limit: int = 1 << 30) -> Cache:
    return Cache(folder, limit, Maps())


def content(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def put(cache: Cache, number: int, size: int = 1000) -> str:
    data = content(number, size)
    assert cache.put(checksum(data), data) == data
    return checksum(data)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


def held(folder: Path) -> int:
    """Bytes of all entries and of what is being written, while others write and delete."""
    total = 0
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def age(cache: Cache, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache._path(name), (then, then))


@pytest.fixture(autouse=True)
def not_warned(monkeypatch):
    monkeypatch.setattr(cache_module, "_unwarned", threading.Lock())


def test_the_entries_used_longest_ago_go_first(tmp_path):
    cache = open_cache(tmp_path, 16_000)
    names = [put(cache, number) for number in range(16)]
    for place, name in enumerate(names):
        age(cache, name, 10_000 - place)
    assert cache.open(names[0]) == content(0), "a use, which makes it the youngest"
    view = cache.open(names[2])
    age(cache, names[2], 9_998)
    names.append(put(cache, 16))
    assert [name for name in names if cache.open(name) is None] == names[1:3], "down to 15/16"
    assert held(tmp_path) == 15_000
    assert view == content(2), "whoever has an entry mapped keeps its bytes"
    put(cache, 17)
    assert held(tmp_path) == 16_000, "no eviction below the limit"


def test_a_use_is_noted_once_a_minute(tmp_path):
    cache = open_cache(tmp_path)
    name = put(cache, 1)
    for seconds, noted in ((TOUCH / 2, False), (TOUCH * 2, True)):
        age(cache, name, seconds)
        cache.open(name)
        assert (time.time() - os.stat(cache._path(name)).st_mtime < TOUCH / 4) == noted


def test_the_limit_is_of_all_processes_and_outlives_them(tmp_path):
    for process in range(10):
        cache = open_cache(tmp_path, 10_000)
        for number in range(3):
            put(cache, 10 * process + number)
            assert held(tmp_path) <= 10_000


def test_a_wrong_count_is_put_right(tmp_path):
    put(open_cache(tmp_path, 10_000), 0)
    (tmp_path / "lock").write_bytes(b"\xff" * 8)
    cache = open_cache(tmp_path, 10_000)
    for number in range(1, 9):
        put(cache, number)
    assert held(tmp_path) == 9_000
    (tmp_path / "lock").write_bytes(b"")
    cache = open_cache(tmp_path, 10_000)
    for number in range(9, 30):
        put(cache, number)
        assert held(tmp_path) <= 10_000


def test_who_waited_while_another_evicted_evicts_nothing_more(tmp_path):
    cache = open_cache(tmp_path, 10_000)
    for number in range(10):
        put(cache, number)
    late = threading.Thread(target=put, args=(cache, 10))
    with cache._hold(cache_module._SCAN, 0):
        late.start()
        time.sleep(0.1)
        assert late.is_alive(), "past the limit it waits"
        cache._count(-5_000)
    late.join()
    assert held(tmp_path) == 11_000


def test_what_is_larger_than_all_of_it_is_not_kept(tmp_path, capsys):
    assert open_cache(tmp_path, 0).put("ab", b"12") is None
    assert capsys.readouterr().err == "", "no cache was asked for"
    assert open_cache(tmp_path, 10).put("ab", b"12345678901") is None
    assert "the cache in" in capsys.readouterr().err
    assert not files(tmp_path)


def test_a_cache_that_is_deleted_under_us_begins_again(tmp_path):
    cache = open_cache(tmp_path / "cache")
    put(cache, 1)
    subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
    assert cache.open(checksum(content(1))) is None
    name = put(cache, 2)
    assert cache.open(name) == content(2)


KILLED = """
import os, signal, sys
from pathlib import Path
from limbeck.trainer.reading import cache as module
from limbeck.trainer.reading.cache import Cache
from limbeck.trainer.reading.mapped import Maps

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def after(action):
    return lambda *args, **options: (action(*args, **options), die())

where, folder = sys.argv[1], Path(sys.argv[2])
cache = Cache(folder, 10_000, Maps())
if where == "created":
    module._lock_file = die
if where == "locked":
    module._lock_file = after(module._lock_file)
if where == "counted":
    os.pwrite = after(os.pwrite)
if where == "before rename":
    os.rename = die
if where == "renamed":
    os.rename = after(os.rename)
if where == "evicting":
    os.unlink = after(os.unlink)
if where == "half written":
    original = open
    class File:
        def __init__(self, *args, **options): self.file = original(*args, **options)
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)
        def write(self, data):
            self.file.write(data[:500])
            self.file.flush()
            die()
    module.open = File
if where == "fetching":
    with cache.lock("shared"):
        die()
cache.put("ab" * 16, b"x" * 1000)
print("not killed")
"""


@pytest.mark.parametrize(
    "where",
    ["created", "locked", "counted", "half written", "before rename", "renamed", "evicting", "fetching"],
)
def test_a_writer_killed_anywhere_leaves_a_usable_cache(tmp_path, where):
    before = open_cache(tmp_path, 10_000)
    for number in range(10):
        put(before, number)
    if where == "fetching":
        assert before.open("ab" * 16) is None
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(tmp_path)], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, ""), killed.stderr
    left = list((tmp_path / "incoming").iterdir())
    assert len(left) == (where in ("created", "locked", "half written", "before rename"))
    for path in left:
        if not path.stat().st_size:  # it might be about to be written: left alone for a minute
            os.utime(path, (time.time() - 2 * TOUCH,) * 2)
    after = open_cache(tmp_path, 10_000)
    began = time.monotonic()
    with after.lock("shared"):
        put(after, 11)
    assert time.monotonic() - began < 5, "its locks ended with it"
    assert not list((tmp_path / "incoming").iterdir())
    assert held(tmp_path) <= 10_000
    for number in range(12):
        data = content(number)
        found = after.open(checksum(data))
        assert found is None or found == data
    kept = after.open("ab" * 16)
    assert (kept is None) == (where != "renamed")


def test_a_living_writer_is_not_swept(tmp_path):
    """Its lock tells; a file that nobody locks is swept, and where locks don't work after an hour."""
    cache = open_cache(tmp_path)
    put(cache, 1)
    incoming = tmp_path / "incoming"
    with open(incoming / "alive", "wb") as alive, open(incoming / "ancient", "wb") as ancient:
        for file in (alive, ancient):
            file.write(b"half")
            file.flush()
            assert cache_module._lock_file(file.fileno())
        os.utime(incoming / "ancient", (0, 0))
        (incoming / "dead").write_bytes(b"half")
        (incoming / "new").write_bytes(b"")
        put(open_cache(tmp_path), 2)
        assert {path.name for path in incoming.iterdir()} == {"alive", "new"}


def full_disk(monkeypatch, number: int = errno.ENOSPC) -> list[str]:
    """Writing of entries fails, as on a full disk, until the list that is returned is not empty."""
    room: list[str] = []

    def limited(path, mode="r"):
        if mode == "xb" and not room:
            Path(path).touch()
            return Failing(number)
        return open(path, mode)

    monkeypatch.setattr(cache_module, "open", limited, raising=False)
    monkeypatch.setattr(cache_module, "_lock_file", lambda handle: False)
    return room


class Failing:
    def __init__(self, number):
        self.number = number

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def fileno(self):
        return -1

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EROFS, "unwrit")])
def test_a_failing_disk_is_told_once_and_costs_no_data(tmp_path, monkeypatch, capsys, number, told):
    cache = open_cache(tmp_path)
    names = [put(cache, number) for number in range(32)]
    full_disk(monkeypatch, number)
    for _ in range(3):
        assert cache.put("ab" * 16, b"12345") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the cache in {tmp_path} is {told}")
    assert os.strerror(number) in line
    assert not list((tmp_path / "incoming").iterdir())
    kept = sum(cache.open(name) is not None for name in names)
    assert kept == 32 if told == "unwrit" else 0 < kept < 32, "a full disk is made room on first"


def test_a_full_disk_is_made_room_on_and_tried_again(tmp_path, monkeypatch, capsys):
    cache = open_cache(tmp_path)
    names = [put(cache, number) for number in range(32)]
    for place, name in enumerate(names):
        age(cache, name, 10_000 - place)
    room, evict = full_disk(monkeypatch), cache._evict
    monkeypatch.setattr(cache, "_evict", lambda *args, **options: (evict(*args, **options), room.append("yes")))
    put(cache, 99)
    assert capsys.readouterr().err == ""
    assert [name for name in names if cache.open(name) is None] == names[:3], "a sixteenth, and what is to come"


def test_a_folder_that_can_not_be_made_costs_no_data(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    cache = open_cache(tmp_path / "file" / "cache")
    with cache.lock("ab"):
        assert cache.open("ab" * 16) is None
        assert cache.put("ab" * 16, b"12345") is None
    cache.drop("ab" * 16)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the cache in {tmp_path}/file/cache is unwritable: Not a directory" in line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes rights")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_on_a_real_disk_that_is_full(small_disk, capsys):
    cache = open_cache(small_disk / "cache")
    for number in range(20):
        put(cache, number, 500_000)
    assert capsys.readouterr().err == "", "the oldest gave way"
    assert 2_500_000 < held(small_disk / "cache") < 4 << 20
    subprocess.run(["rm", "-r", str(small_disk / "cache")], check=True)
    with contextlib.suppress(OSError), open(small_disk / "other", "wb") as other:
        while True:
            other.write(b"x" * 4096)
            other.flush()
    for number in range(20, 30):
        data = content(number, 3_000_000)
        assert cache.put(checksum(data), data) is None
    assert len(capsys.readouterr().err.splitlines()) == 1


BUSY = """
import random, sys, threading, time
from pathlib import Path
from limbeck.storage_schemas.ranges import checksum
from limbeck.trainer.reading.cache import Cache
from limbeck.trainer.reading.mapped import Maps

folder, limit, seconds, seed = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
cache = Cache(folder, limit, Maps())
counts = [0, 0, 0]

def work(thread):
    choose = random.Random(1000 * seed + thread)
    held = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(counts[:2]) <= 20:
        data = random.Random(choose.randrange(200)).randbytes(50_000)
        name = checksum(data)
        found = cache.open(name, size=len(data))
        if found is None:
            counts[0] += 1
            with cache.lock(name):
                found = cache.put(name, data)
        else:
            counts[1] += 1
        assert found is not None and found == data
        held = [*held[-20:], (found, data)]
        assert all(one == other for one, other in held)
        counts[2] += 1

threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
failed = []
threading.excepthook = lambda args: failed.append(repr(args.exc_value))
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
print(*counts)
"""


def busy(folder: Path, limit: int, seconds: float, seed: int) -> subprocess.Popen:
    arguments = [str(folder), str(limit), str(seconds), str(seed)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUSY), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd(),
    )  # fmt: skip


def stopped(folder: Path, processes: list[subprocess.Popen]) -> int:
    """Bytes that are there while nobody moves."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        while process.poll() is None and Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1][0] not in "TZ":
            time.sleep(0.001)
    there = held(folder)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    return there


def test_several_processes_write_read_and_evict_at_once(tmp_path):
    """200 entries of 50 kB, 60 fit."""
    processes = [busy(tmp_path, 3_000_000, 3, seed) for seed in range(3)]
    most = 0
    while all(process.poll() is None for process in processes):
        time.sleep(0.02)
        most = max(most, stopped(tmp_path, processes))
    for process in processes:
        output, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        fetched, found, _ = map(int, output.split())
        assert fetched > 20
        assert found > 20
    assert 2_000_000 < most <= 3_000_000 + 6 * 50_000, "and what six threads are writing"
    assert not list((tmp_path / "incoming").iterdir())


@pytest.mark.faults
def test_processes_that_are_killed_all_the_time(tmp_path):
    stop = time.monotonic() + 40
    survivor = busy(tmp_path, 3_000_000, 40, 99)
    choose = random.Random(0)
    most = 0
    while time.monotonic() < stop:
        victims = [busy(tmp_path, 3_000_000, 100, choose.randrange(1 << 20)) for _ in range(2)]
        end = time.monotonic() + choose.uniform(1, 3)
        while time.monotonic() < end:
            time.sleep(0.02)
            most = max(most, stopped(tmp_path, [survivor, *victims]))
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
    _, errors = survivor.communicate()
    assert (survivor.returncode, errors) == (0, "")
    assert most <= 3_000_000 + 10 * 50_000
    for path in (tmp_path / "incoming").iterdir():
        os.utime(path, (time.time() - 2 * TOUCH,) * 2)
    put(open_cache(tmp_path, 3_000_000), 1)
    assert not list((tmp_path / "incoming").iterdir())
    assert held(tmp_path) <= 3_000_000
    for path in files(tmp_path):
        assert checksum(path.read_bytes()) == path.name
