"""Chunks: the committed bits or an error, from any store, past any damage to the cache, in few requests."""

import os
import pickle
import resource
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import fsspec
import numpy as np
import pytest

from limbeck.storage_schemas.commit import Chunk, Commit
from limbeck.storage_schemas.errors import CorruptShard, StoreError
from limbeck.storage_schemas.ranges import checksum
from limbeck.storage_schemas.store import Store
from limbeck.trainer.reading import chunks as chunks_module
from limbeck.trainer.reading.cache import default_folder
from limbeck.trainer.reading.chunks import GAP, REGION, Chunks, Reading
from limbeck.trainer.reading.mapped import Maps
from tests import servers
from tests.proxy import Proxy

MODES = ("always", "first", "never")


def make_shard(store: Store, name: str, lengths: list[int], gaps: list[int] | None = None, seed: int = 0) -> Commit:
    """A file of random chunks, each after so many bytes that belong to none."""
    random = np.random.default_rng([seed, *name.encode()])
    data, chunks = b"", []
    for row, (length, gap) in enumerate(zip(lengths, gaps or [0] * len(lengths), strict=True)):
        data += random.bytes(gap)
        piece = random.bytes(length)
        one = {"column": "noise", "first_row": row, "rows": 1, "offset": len(data), "length": length}
        chunks.append(Chunk(**one, xxh3=checksum(piece)))
        data += piece
    store.write(name, data)
    return Commit(
        split="train", index=0, samples_per_shard=64, recipe_id="0" * 64, layout_id="parquet-64", attempt="0" * 16,
        path=name, bytes=len(data), sha256="0" * 64, rows=len(lengths), chunks=tuple(chunks), seconds=0, nfe=0,
        machine={}, committed_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def all_of(*commits: Commit) -> list[tuple[Commit, Chunk]]:
    return [(commit, chunk) for commit in commits for chunk in commit.chunks]


def committed(store: Store, wanted: list[tuple[Commit, Chunk]]) -> list[bytes]:
    whole = {commit.path: store.read(commit.path) or b"" for commit, _ in wanted}
    return [whole[commit.path][chunk.offset : chunk.offset + chunk.length] for commit, chunk in wanted]


def bits(found: list[memoryview | CorruptShard]) -> list[bytes]:
    problems = [one for one in found if isinstance(one, CorruptShard)]
    assert not problems, problems
    return [bytes(one) for one in found]


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    pytest.importorskip("moto")
    with servers.moto(tmp_path_factory.mktemp("moto")) as server, Proxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3_store(s3, monkeypatch):
    for name, value in servers.environment(s3.endpoint).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return Store.create(f"s3://{servers.BUCKET}/{secrets.token_hex(6)}")


@pytest.fixture
def memory_store():
    name = secrets.token_hex(6)
    yield Store.create(f"memory://{name}/store")
    fsspec.filesystem("memory").rm(name, recursive=True)


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store.create(str(tmp_path / "store"))
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture
def reading(tmp_path):
    return lambda **options: Reading(cache_folder=tmp_path / "cache", **options)


@pytest.fixture
def requests(monkeypatch):
    """(path, ranges) of every request for ranges."""
    seen, read_ranges = [], Store.read_ranges

    def recorded(self, path, ranges):
        seen.append((path, list(ranges)))
        return read_ranges(self, path, ranges)

    monkeypatch.setattr(Store, "read_ranges", recorded)
    return seen


@pytest.fixture
def checks(monkeypatch):
    seen, check_chunk = [], chunks_module.check_chunk

    def counted(store, commit, chunk, data):
        seen.append(chunk.offset)
        check_chunk(store, commit, chunk, data)

    monkeypatch.setattr(chunks_module, "check_chunk", counted)
    return seen


def entries(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "cache").glob("??/*")}


@pytest.mark.parametrize("verify", MODES)
def test_every_store_gives_the_committed_bits_in_the_order_asked(store, reading, verify):
    commits = [make_shard(store, f"a/{i}.bin", [70_000, 1, 0, 4097, 300_000]) for i in range(3)]
    wanted = all_of(*commits)
    wanted = [wanted[place] for place in np.random.default_rng(0).permutation(len(wanted))] + wanted[:2]
    chunks = Chunks(store, reading(verify=verify))
    for _ in range(2):
        found = chunks.open(wanted)
        assert bits(found) == committed(store, wanted)
        assert all(one.readonly for one in found)
    again = pickle.loads(pickle.dumps(chunks))
    assert bits(again.open(wanted)) == committed(store, wanted)
    assert chunks.open([]) == []


def test_near_chunks_share_a_request_and_cached_ones_need_none(memory_store, reading, requests):
    gaps = [5, 0, GAP - 1, GAP, 0, 0]
    commit = make_shard(memory_store, "a.bin", [1000, 2000, 3000, 4000, 5000, 6000], gaps)
    at = {number: chunk.offset for number, chunk in enumerate(commit.chunks)}
    chunks = Chunks(memory_store, reading())
    wanted = [pair for number, pair in enumerate(all_of(commit)) if number != 4]
    assert bits(chunks.open(wanted)) == committed(memory_store, wanted)
    near, far = (at[0], at[2] + 3000 - at[0]), (at[3], at[5] + 6000 - at[3])
    assert requests == [("a.bin", [near, far])], "touching, nearly touching, and apart"
    chunks.open(wanted)
    chunks.open(all_of(commit))
    assert requests[1:] == [("a.bin", [(at[4], 5000)])], "only what the cache did not have"


def test_a_long_run_on_s3_is_fetched_by_regions_side_by_side(s3_store, s3, reading):
    """6 chunks that touch, of 5 MiB each: 4 begin in the first region, 2 in the second."""
    commit = make_shard(s3_store, "a.bin", [5 << 20] * 6)
    before = s3.seen["range"]
    found = Chunks(s3_store, reading()).open(all_of(commit))
    assert s3.seen["range"] - before == 2
    assert bits(found) == committed(s3_store, all_of(commit))
    assert REGION == 16 << 20


@pytest.mark.parametrize(("verify", "expected"), [("always", [3, 6]), ("first", [3, 3]), ("never", [0, 0])])
def test_local_chunks_are_checked_when_told(tmp_path, reading, checks, verify, expected):
    store = Store.create(str(tmp_path / "store"))
    wanted = all_of(make_shard(store, "a.bin", [10, 20, 30]))
    chunks = Chunks(store, reading(verify=verify))
    for count in expected:
        chunks.open(wanted)
        assert len(checks) == count


@pytest.mark.parametrize(("verify", "expected"), [("always", [3, 6, 9]), ("first", [3, 3, 6]), ("never", [3, 3, 3])])
def test_fetched_chunks_are_checked_once_and_then_when_told(memory_store, reading, checks, verify, expected):
    wanted = all_of(make_shard(memory_store, "a.bin", [10, 20, 30]))
    ours, another = (Chunks(memory_store, reading(verify=verify)) for _ in range(2))
    for chunks, count in zip((ours, ours, another), expected, strict=True):
        chunks.open(wanted)
        assert len(checks) == count


def test_a_flipped_bit_in_a_folder_is_found_and_named(tmp_path, reading):
    store = Store.create(str(tmp_path / "store"))
    commit = make_shard(store, "a.bin", [1000, 2000, 3000])
    right = committed(store, all_of(commit))
    damage(tmp_path / "store/a.bin", 1500)
    for verify in ("always", "first"):
        found = Chunks(store, reading(verify=verify)).open(all_of(commit))
        assert "column noise, rows 1 to 1 (bytes 1000 to 2999) does not match its checksum" in str(found[1])
        assert bits([found[0], found[2]]) == [right[0], right[2]]
    blind = bits(Chunks(store, reading(verify="never")).open(all_of(commit)))
    assert [one == two for one, two in zip(blind, right, strict=True)] == [True, False, True]
    damage(tmp_path / "store/a.bin", 1500)
    assert bits(Chunks(store, reading()).open(all_of(commit))) == right


def test_a_folder_that_answers_wrong_once_is_asked_again(tmp_path, reading, monkeypatch):
    store = Store.create(str(tmp_path / "store"))
    wanted, wrong, check_chunk = all_of(make_shard(store, "a.bin", [10, 20])), [1], chunks_module.check_chunk

    def hasty(store, commit, chunk, data):
        check_chunk(store, commit, chunk, data)
        if wrong and wrong.pop():
            raise CorruptShard("for once")

    monkeypatch.setattr(chunks_module, "check_chunk", hasty)
    assert bits(Chunks(store, reading()).open(wanted)) == committed(store, wanted)
    assert not wrong


@pytest.mark.parametrize("verify", MODES)
def test_a_file_cut_while_it_is_mapped_is_an_error_and_no_signal(tmp_path, reading, verify):
    store = Store.create(str(tmp_path / "store"))
    commit, other = make_shard(store, "a.bin", [1 << 20, 1 << 20]), make_shard(store, "b.bin", [5])
    chunks = Chunks(store, reading(verify=verify))
    held = chunks.open(all_of(commit))
    os.truncate(tmp_path / "store/a.bin", 100)
    *cut, fine = chunks.open(all_of(commit, other))
    for one in cut:
        assert f"a.bin has 100 bytes, its commit says {2 << 20}, {(2 << 20) - 100} bytes are missing" in str(one)
    assert bytes(fine) == committed(store, all_of(other))[0]
    (tmp_path / "store/a.bin").unlink()
    assert all("a.bin is missing" in str(one) for one in chunks.open(all_of(commit)))
    assert len(held) == 2


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_cut_or_missing_object_loses_only_what_is_gone(kind, request, reading):
    """S3 refuses a range behind the end: what lies before it must not be refused with it."""
    store = request.getfixturevalue(f"{kind}_store")
    commit, other = make_shard(store, "a.bin", [1000] * 3, [0, GAP, GAP]), make_shard(store, "b.bin", [10])
    right = committed(store, all_of(commit, other))
    whole = store.read("a.bin")
    store.write("a.bin", whole[: commit.chunks[1].offset + 100])
    found = Chunks(store, reading(verify="never")).open(all_of(commit, other))
    assert bits([found[0], found[3]]) == [right[0], right[3]]
    assert all("missing" in str(one) and isinstance(one, CorruptShard) for one in found[1:3])
    store.remove("a.bin")
    found = Chunks(store, reading()).open(all_of(commit, other))
    assert bits([found[0], found[3]]) == [right[0], right[3]], "the cache still has the first"
    assert all("a.bin is missing" in str(one) for one in found[1:3])
    store.write("a.bin", whole)
    assert bits(Chunks(store, reading()).open(all_of(commit, other))) == right


def test_a_wrong_answer_is_fetched_again_and_a_wrong_store_is_an_error(memory_store, reading, monkeypatch, tmp_path):
    commit = make_shard(memory_store, "a.bin", [1000, 1000, 1000])
    right, asked, wrong = committed(memory_store, all_of(commit)), [], [1]
    read_ranges = Store.read_ranges

    def damaged(self, path, ranges):
        asked.append(list(ranges))
        pieces = [bytearray(piece) for piece in read_ranges(self, path, ranges)]
        for (offset, length), piece in zip(ranges, pieces, strict=True):
            if offset <= 1500 < offset + length and wrong[0]:
                wrong[0] -= 1
                piece[1500 - offset] ^= 1
        return [bytes(piece) for piece in pieces]

    monkeypatch.setattr(Store, "read_ranges", damaged)
    assert bits(Chunks(memory_store, reading()).open(all_of(commit))) == right
    assert asked == [[(0, 3000)], [(1000, 1000)]], "only the wrong one again"
    wrong[0] = 100
    bad = Chunks(memory_store, Reading(cache_folder=tmp_path / "empty")).open(all_of(commit))
    assert isinstance(bad[1], CorruptShard)
    assert bits([bad[0], bad[2]]) == [right[0], right[2]]
    assert bits(Chunks(memory_store, reading()).open(all_of(commit))) == right, "a good cache outlives a bad store"


def test_a_store_that_fails_is_no_corruption_and_costs_nothing_twice(memory_store, reading, monkeypatch, requests):
    commits = [make_shard(memory_store, f"{i}.bin", [1000]) for i in range(20)]
    read_ranges = Store.read_ranges

    def away(self, path, ranges):
        if path == "7.bin":
            time.sleep(0.2)
            raise StoreError("away")
        return read_ranges(self, path, ranges)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read_ranges", away)
        with pytest.raises(StoreError, match="away"):
            Chunks(memory_store, reading()).open(all_of(*commits))
    requests.clear()
    wanted = all_of(*commits)
    assert bits(Chunks(memory_store, reading()).open(wanted)) == committed(memory_store, wanted)
    assert [path for path, _ in requests] == ["7.bin"]


@pytest.mark.parametrize("verify", MODES)
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "longer"])
def test_a_damaged_entry_is_dropped_and_fetched_anew(memory_store, reading, requests, tmp_path, verify, how):
    wanted = all_of(make_shard(memory_store, "a.bin", [1000, 2000]))
    right = committed(memory_store, wanted)
    Chunks(memory_store, reading()).open(wanted)
    entry = entries(tmp_path)[wanted[1][1].xxh3]
    data = bytearray(right[1])
    data[700] ^= 4
    entry.write_bytes({"flipped": data, "cut": right[1][:-1], "emptied": b"", "longer": right[1] + b"x"}[how])
    requests.clear()
    found = bits(Chunks(memory_store, reading(verify=verify)).open(wanted))
    if how == "flipped" and verify == "never":
        assert (found[0], found[1], requests) == (right[0], data, []), "what `never` means"
    else:
        assert (found, requests) == (right, [("a.bin", [(1000, 2000)])])
        assert entry.read_bytes() == right[1]
    entry.write_bytes(data)
    memory_store.remove("a.bin")
    found = Chunks(memory_store, reading()).open(wanted)
    assert (bytes(found[0]), type(found[1])) == (right[0], CorruptShard)
    assert not entry.exists(), "nobody else shall take it for good"


def test_many_who_want_the_same_fetch_it_once(memory_store, reading, requests, monkeypatch):
    wanted = all_of(make_shard(memory_store, "a.bin", [1000] * 5, [0, GAP, 0, GAP, 0]))
    ranks = [Chunks(memory_store, reading()) for _ in range(4)]
    read_ranges = Store.read_ranges
    monkeypatch.setattr(Store, "read_ranges", lambda *args: (time.sleep(0.1), read_ranges(*args))[1])
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda rank: rank.open(wanted), ranks):
            assert bits(found) == committed(memory_store, wanted)
    assert len(requests) == 1


def test_bytes_in_flight_are_bounded(memory_store, reading, monkeypatch, tmp_path):
    """Of 40 shards of 1 MB and one of 5 MB, at most 3 MB at a time, and the large one alone."""
    commits = [make_shard(memory_store, f"{i}.bin", [1_000_000 if i != 20 else 5_000_000]) for i in range(41)]
    chunks = Chunks(memory_store, reading(in_flight_bytes=3_000_000))
    lock, flying, most, with_large = threading.Lock(), [0], [0], []
    read_ranges, put = Store.read_ranges, chunks._cache.put

    def fly(self, path, ranges):
        size = sum(length for _, length in ranges)
        with lock:
            flying[0] += size
            most[0] = max(most[0], flying[0]) if size < 5_000_000 else most[0]
            with_large.extend([flying[0]] if path == "20.bin" else [])
        time.sleep(0.01)
        return read_ranges(self, path, ranges)

    def land(name, data):
        kept = put(name, data)
        with lock:
            flying[0] -= len(data)
        return kept

    monkeypatch.setattr(Store, "read_ranges", fly)
    monkeypatch.setattr(chunks._cache, "put", land)
    assert bits(chunks.open(all_of(*commits))) == committed(memory_store, all_of(*commits))
    assert most[0] == 3_000_000, "used, and never passed"
    assert with_large == [5_000_000]


def test_a_chunk_of_a_small_budget_is_not_joined_with_others(memory_store, reading, requests):
    commit = make_shard(memory_store, "a.bin", [1000, 1000, 1000, 5000])
    found = Chunks(memory_store, reading(in_flight_bytes=2000)).open(all_of(commit))
    assert bits(found) == committed(memory_store, all_of(commit))
    assert [ranges for _, ranges in requests] == [[(0, 2000)], [(2000, 1000)], [(3000, 5000)]]


def test_a_map_is_shared_while_it_is_used_and_holds_no_descriptor(tmp_path):
    for i in range(200):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 5000)
    maps, (soft, hard) = Maps(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        views = [maps.open(str(tmp_path / str(i))) for i in range(200)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(view[4999] == i for i, view in enumerate(views))
    mapped = lambda: Path("/proc/self/maps").read_text().count(str(tmp_path))  # noqa: E731
    again = [maps.open(str(tmp_path / str(i))) for i in range(200)]
    assert mapped() == 200
    (tmp_path / "7").unlink()
    part = np.frombuffer(views[7][10:20], np.uint8)
    del views, again
    assert mapped() == 1
    assert part.tolist() == [7] * 10


def test_a_map_is_readable_until_the_process_is_gone(tmp_path):
    """A thread may still read while the interpreter ends."""
    (tmp_path / "a").write_bytes(b"x" * 5000)
    program = f"""
import atexit
atexit.register(lambda: print(view[4999]))
from limbeck.trainer.reading.mapped import Maps
view = Maps().open({str(tmp_path / "a")!r})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, f"{ord('x')}\n"), ended.stderr


@pytest.mark.parametrize("verify", MODES)
def test_derived_bytes_are_made_once_and_checked_by_their_own_checksum(tmp_path, reading, verify):
    store, made = Store.create(str(tmp_path / "store")), []

    def make() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return b"columns" * 1000

    ranks = [Chunks(store, reading(verify=verify)) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda rank: rank.derived("a.tar output", make, size=7000), ranks):
            assert bytes(found) == b"columns" * 1000
    assert len(made) == 1
    (entry,) = entries(tmp_path).values()
    clean = entry.read_bytes()
    for damaged in (clean[:-1], b"", clean[:100] + b"X" + clean[101:]):
        entry.write_bytes(damaged)
        blind = verify == "never" and len(damaged) == len(clean)
        found = Chunks(store, reading(verify=verify)).derived("a.tar output", make, size=7000)
        assert (bytes(found) == b"columns" * 1000) != blind
    assert len(made) == 3 if verify == "never" else 4
    assert bytes(ranks[0].derived("another", lambda: b"", size=0)) == b""


def test_the_default_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "limbeck"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path("/home/somebody/.cache/limbeck")


@pytest.mark.faults
def test_latency_is_hidden_by_requests_side_by_side(tmp_path, monkeypatch, reading):
    """64 chunks of 3 MB, each a request of its own, 0.2 s of latency: 13 s one after another."""
    with ExitStack() as stack:
        server = stack.enter_context(servers.seaweed(tmp_path))
        proxy = stack.enter_context(Proxy(server.endpoint))
        for name, value in servers.environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        store = Store.create(f"s3://{servers.BUCKET}/latency")
        wanted = all_of(*(make_shard(store, f"{i}.bin", [3_000_000]) for i in range(64)))
        proxy.latency = 0.2
        began = time.perf_counter()
        found = Chunks(store, reading()).open(wanted)
        seconds = time.perf_counter() - began
        proxy.latency = 0.0
        assert bits(found) == committed(store, wanted)
    assert seconds < 8
