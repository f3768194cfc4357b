import os
import pickle
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from limbeck.storage_schemas import backends, paths
from limbeck.storage_schemas import store as store_module
from limbeck.storage_schemas.errors import StoreError, UsageError
from limbeck.storage_schemas.paths import STORE
from limbeck.storage_schemas.store import Store


def test_files_come_back_whole_and_in_ranges(store: Store, tmp_path: Path) -> None:
    assert store.read("a/b.bin") is None
    assert store.size("a/b.bin") is None
    assert not store.exists("a/b.bin")
    (tmp_path / "source").write_bytes(b"0123456789")
    store.upload(tmp_path / "source", "a/b.bin")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.size("a/b.bin") == 10
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert list(store.read_ranges("a/b.bin", [(8, 4), (0, 1)])) == [b"89", b"0"]
    assert list(store.read_many(["a/b.bin", "a/c.bin"])) == [b"0123456789", None]
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"
    store.remove("a/b.bin")
    store.remove("a/b.bin")
    assert store.read("a/b.bin") is None
    with pytest.raises(store_module.MissingFile, match=r"a/b.bin is missing$"):
        store.read_range("a/b.bin", 0, 1)


def test_listing_sees_what_another_handle_wrote(store: Store) -> None:
    assert list(store.list("folder")) == []
    other = pickle.loads(pickle.dumps(store))
    for number in range(3):
        other.put_if_absent(f"folder/{number}.json", b"x")
        assert list(store.list("folder")) == [f"{n}.json" for n in range(number + 1)]
    other.put_if_absent("folder/sub/deep.json", b"x")
    assert list(store.list("folder")) == ["0.json", "1.json", "2.json", "sub"]


def test_put_if_absent_tells_who_won(store: Store) -> None:
    assert store.put_if_absent("deep/er/one", b"first") == b"first"
    assert store.put_if_absent("deep/er/one", b"second") == b"first"
    assert store.read("deep/er/one") == b"first"


def test_paths_stay_inside(store: Store) -> None:
    for path in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(StoreError, match="no path in a store"):
            store.read(path)


def test_a_store_is_created_once_and_opened_by_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    created = Store.create("./pairs")
    document = created.read(STORE)
    assert created.uri == str(tmp_path / "pairs") == Store.open("pairs").uri
    assert Store.create(f"file://{tmp_path}/pairs").read(STORE) == document
    assert created.local_path("a") == str(tmp_path / "pairs" / "a")
    sent = pickle.dumps(created)
    monkeypatch.chdir("/")
    assert pickle.loads(sent).read(STORE) == document


def test_what_is_no_store_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere is not a store \(no store.json\): `limbeck generate` makes"):
        Store.open(str(tmp_path / "nowhere"))
    (tmp_path / STORE).write_text('{"schema_version": 99, "writer": "a", "single_writer": false}')
    with pytest.raises(StoreError, match="schema version 99, this program reads 2"):
        Store.open(str(tmp_path))
    with pytest.raises(StoreError, match="nosuch:// is unknown to fsspec"):
        Store.open("nosuch://x")
    with pytest.raises(StoreError, match="chained"):
        Store.open("simplecache::s3://bucket/x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="NotADirectoryError"):
        Store.create(str(tmp_path / "file" / "store"))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "`limbeck generate` makes one"),
        (["notes.txt"], "`limbeck generate` makes one"),
        (["000000.tar"], "it holds 1 .tar file that no command of ours wrote"),
        (["a.parquet", "b.parquet", "c.tar", "x.json"], "it holds 2 .parquet files and 1 .tar file that no command"),
    ],
)
def test_what_somebody_else_wrote_is_named(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(StoreError) as refused:
        Store.open(str(tmp_path))
    assert f"{tmp_path} is not a store (no store.json): {told}" in str(refused.value)
    assert ("describes the format" in str(refused.value)) == ("it holds" in told)


@pytest.mark.parametrize("act", [Store.open, Store.create])
def test_a_file_is_no_store(tmp_path: Path, act: Callable[[str], Store]) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"a.tar is a file, not a store: give the folder of a store"):
        act(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://bucket//a", "s3://bucket/a"),
        ("s3://bucket/a//b///", "s3://bucket/a/b"),
        ("s3://KEY:secret//x@bucket//a", "s3://bucket/a"),
        ("memory://a//b/", "memory://a/b"),
    ],
)
def test_empty_parts_of_a_uri_are_left_out(uri: str, told: str) -> None:
    assert Store(uri).uri == told


@pytest.mark.parametrize("uri", ["s3:bucket/a", "s3:/bucket/a", "S3://bucket/a"])
def test_a_misspelt_uri_makes_no_folder(uri: str) -> None:
    with pytest.raises(UsageError, match=r"write s3://bucket/a$"):
        Store(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///folder"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(StoreError, match="names no bucket"):
        Store(uri)


def without_mode(self: object, path: str, value: bytes, **kwargs: object) -> None:
    """As fsspec before 2024.12 wrote: a `mode` is one more option that it knows nothing of."""


def with_mode_among_others(self: object, path: str, value: bytes, **kwargs: object) -> None:
    """As adlfs writes, whose signature does not say it."""
    kwargs.pop("mode", "")


@pytest.mark.parametrize("opened", [Store.open, Store.create])
def test_an_fsspec_that_ignores_exclusive_creates_is_refused(
    opened: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared = (f"memory://{secrets.token_hex(6)}" for _ in range(2))
    Store.create(shared)
    Store.create(alone, single_writer=True)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", without_mode)
    with pytest.raises(StoreError, match=r"MemoryFileSystem of fsspec [\d.]+ ignores .*: install fsspec>=2024\.12$"):
        opened(shared)
    assert opened(alone).single_writer
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", with_mode_among_others)
    assert opened(shared).uri == shared


@pytest.mark.parametrize("opened", [Store.open, Store.create])
def test_an_s3_client_that_ignores_exclusive_creates_is_refused(
    opened: Callable[[str], Store], s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.create(s3_uri)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "_pipe_file", without_mode)
    said = r"S3FileSystem of fsspec [\d.]+ ignores .*: install fsspec>=2024\.12 and the newest s3fs$"
    with pytest.raises(StoreError, match=said):
        opened(s3_uri)


def test_an_fsspec_that_returns_errors_as_bytes_is_read_as_one_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(f"memory://{secrets.token_hex(6)}")

    def ranges(self: object, names: list[str], *more: object, **options: object) -> list[bytes | Exception]:
        return [b"x", FileNotFoundError(names[1])]

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", ranges)
    with pytest.raises(store_module.MissingFile):
        store.read_ranges("a", [(0, 1), (1, 1)])


def test_other_protocols_need_a_single_writer() -> None:
    class Plain(MemoryFileSystem):
        protocol = "plain"
        store: ClassVar[dict[str, Any]] = {}

    fsspec.register_implementation("plain", Plain, clobber=True)
    with pytest.raises(StoreError, match=r"^plain://a: plain has no conditional create.* --single-writer$"):
        Store.create("plain://a")
    store = Store.create("plain://a", single_writer=True)
    assert store.put_if_absent("x", b"1") == store.put_if_absent("x", b"2") == Store.open("plain://a").read("x") == b"1"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:s3cr3t/with+slash@bucket/folder",
        "s3://AKIAKEY:s3cr3t@bucket/folder?token=s3cr3t",
        "ftp://user:s3cr3t@host/folder",
        "s3://s3cr3t@bucket/folder",
    ],
)
def test_credentials_in_a_uri_are_never_shown(uri: str) -> None:
    try:
        store = Store(uri)
    except StoreError as error:
        shown = str(error)
    else:
        told = store._as_store_error("a", PermissionError("key s3cr3t/with+slash of AKIAKEY"))
        shown = f"{store.uri} {store!r} {told} {store.put_if_absent.__self__}"
        assert store.uri == "s3://bucket/folder"
        assert pickle.loads(pickle.dumps(store))._fs.secret == "s3cr3t/with+slash"
    assert "s3cr3t" not in shown
    assert "AKIAKEY" not in shown
    assert "\n" not in shown


def test_storage_that_lets_two_writers_win_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "create", lambda fs, protocol, path, data: fs.pipe_file(path, data))
    with pytest.raises(StoreError, match=r"memory://leaky accepted a conditional create .* --single-writer"):
        Store.create("memory://leaky")
    with pytest.raises(StoreError, match="not a store"):
        Store.open("memory://leaky")
    alone = Store.create("memory://leaky", single_writer=True)
    assert alone.single_writer
    assert Store.open("memory://leaky").single_writer
    assert alone.put_if_absent("x", b"1") == alone.put_if_absent("x", b"2") == b"1"
    fsspec.filesystem("memory").rm("/leaky", recursive=True)


def test_refused_credentials_are_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> bytes:
        raise PermissionError("Forbidden\nrequest id 17")

    monkeypatch.setattr(backends, "read", forbidden)
    with pytest.raises(
        StoreError, match=r"store.json: PermissionError: Forbidden: check the credentials and their rights$"
    ):
        store.read(STORE)


class Unsure:
    """A create whose n-th call goes wrong in the n-th way, then works."""

    def __init__(self, *ways: str) -> None:
        self.ways, self.calls = list(ways), 0
        self.real = backends.create

    def __call__(self, fs: Any, protocol: str, path: str, data: bytes) -> None:
        self.calls += 1
        way = self.ways.pop(0) if self.ways else "works"
        if way in ("works", "lost response"):
            self.real(fs, protocol, path, data)
        if way == "rival":
            self.real(fs, protocol, path, b"rival")
        if way != "works":
            raise {"exists": FileExistsError, "denied": PermissionError}.get(way, OSError)(way)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_sleep")
@pytest.mark.parametrize(
    ("ways", "there", "calls"),
    [
        (["lost response"], b"ours", 1),  # written, then the connection fell: read back as ours
        (["rival"], b"rival", 1),  # 412 in whatever shape
        (["409", "409"], b"ours", 3),  # a conflict is tried again
        (["409", "rival"], b"rival", 2),
        (["503", "lost response"], b"ours", 2),
        (["exists"], b"ours", 2),  # told that it exists, yet it doesn't: tried again
    ],
)
def test_unknown_outcomes_are_read_back(
    store: Store, monkeypatch: pytest.MonkeyPatch, ways: list[str], there: bytes, calls: int
) -> None:
    unsure = Unsure(*ways)
    monkeypatch.setattr(backends, "create", unsure)
    assert store.put_if_absent("commit", b"ours") == there == store.read("commit")
    assert unsure.calls == calls


@pytest.mark.usefixtures("no_sleep")
def test_tries_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for ways, calls, message in ((["500"] * 99, 12, "500"), (["denied"], 1, "check the credentials")):
        unsure = Unsure(*ways)
        monkeypatch.setattr(backends, "create", unsure)
        with pytest.raises(StoreError, match=message):
            store.put_if_absent("commit", b"ours")
        assert unsure.calls == calls


def test_one_thread_of_sixteen_wins(store: Store) -> None:
    def race(number: int) -> bytes:
        barrier.wait()
        return store.put_if_absent(path, bytes([number]) * 65536)

    with ThreadPoolExecutor(16) as threads:
        for path in (f"race/{round_}" for round_ in range(20)):
            barrier = threading.Barrier(16)
            seen = list(threads.map(race, range(16)))
            assert set(seen) == {store.read(path)}, "everybody sees the one whole winner"
            assert sum(there == bytes([number]) * 65536 for number, there in enumerate(seen)) == 1
    assert len(store.list("race")) == 20


def _race(uri: str, number: int, rounds: int, barrier: Any, results: Any) -> None:
    store = Store(uri)
    for round_ in range(rounds):
        barrier.wait()
        there = store.put_if_absent(f"race/{round_}", bytes([number]) * 65536)
        results.put((round_, number, there[0], there == there[:1] * 65536))


def test_one_process_of_eight_wins(tmp_path: Path) -> None:
    Store.create(str(tmp_path))
    context, rounds = get_context("fork"), 25
    barrier, results = context.Barrier(8), context.SimpleQueue()
    racers = [context.Process(target=_race, args=(str(tmp_path), n, rounds, barrier, results)) for n in range(8)]
    for racer in racers:
        racer.start()
    seen = [results.get() for _ in range(8 * rounds)]
    for racer in racers:
        racer.join()
    assert all(whole for *_, whole in seen)
    for round_ in range(rounds):
        winners = {there for number, _, there, _ in seen if number == round_}
        assert len(winners) == 1
        assert winners <= set(range(8))
    assert not [name for name in os.listdir(tmp_path / "race") if name.startswith(".")], "no temporary file stays"


def test_a_killed_writer_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(str(tmp_path))
    monkeypatch.setattr(store_module, "TRIES", 1)

    def dies(*args: object) -> None:
        raise KeyboardInterrupt

    original: Callable[..., None] = os.link
    monkeypatch.setattr(os, "link", dies)
    with pytest.raises(KeyboardInterrupt):
        store.put_if_absent("commits/a.json", b"half")
    monkeypatch.setattr(os, "link", original)
    assert list(store.list("commits")) == []
    assert store.read("commits/a.json") is None
    assert store.put_if_absent("commits/a.json", b"whole") == b"whole"


def test_a_folder_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(StoreError, match="without hard links"):
        Store.create(str(tmp_path / "store"))
    assert Store.create(str(tmp_path / "store"), single_writer=True).put_if_absent("a", b"1") == b"1"


OUTWARD = (
    lambda store, path: store.read(path),
    lambda store, path: store.read_many([path]),
    lambda store, path: store.read_range(path, 0, 1),
    lambda store, path: store.size(path),
    lambda store, path: store.local_path(path),
    lambda store, path: store.write(path, b"x"),
    lambda store, path: store.put_if_absent(path, b"x"),
    lambda store, path: store.upload(__file__, path),
    lambda store, path: store.remove(path),
)


@pytest.mark.parametrize("action", OUTWARD)
@pytest.mark.parametrize("link", ["folder", "file", "to the root's namesake"])
def test_nothing_goes_through_a_link_out_of_a_store(tmp_path: Path, action: Callable[..., object], link: str) -> None:
    store = Store.create(str(tmp_path / "store"))
    outside = tmp_path / ("store-too" if "namesake" in link else "mine")
    outside.mkdir()
    (outside / "thesis.tex").write_text("mine")
    if link == "file":
        (tmp_path / "store/shards").mkdir()
        (tmp_path / "store/shards/thesis.tex").symlink_to(outside / "thesis.tex")
    else:
        (tmp_path / "store/shards").symlink_to(outside)
    with pytest.raises(StoreError, match=r"is a link out of the store .*: remove it$"):
        action(store, "shards/thesis.tex")
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]


def test_links_inside_of_a_store_and_to_it_are_followed(tmp_path: Path) -> None:
    Store.create(str(tmp_path / "real")).write("a/b", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/c").symlink_to(tmp_path / "real/a")
    store = Store.open(str(tmp_path / "link"))
    assert store.read("a/b") == store.read("c/b") == b"1"
    store.write("c/d", b"2")
    assert store.list("a") == ["b", "d"]


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a//b",
        "a/",
        "./a",
        "a/.",
        "a/../b",
        "..",
        "C:/a",
        "s3:/a",
        "s3://b/a",
        "file:a",
        "a\\b",
        "a\nb",
        "\x1b[2J",
    ],
)
def test_one_rule_says_which_paths_are_in_a_store(path: str) -> None:
    assert paths.is_outside(path)
    with pytest.raises(StoreError, match="is no path in a store") as refused:
        paths.join("/root", path)
    assert len(str(refused.value).splitlines()) == 1
    assert paths.join("/root", "pins/run:1-é.json") == "/root/pins/run:1-é.json"


def test_names_that_no_path_may_have_are_not_listed(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    store.write("pins/a.json", b"{}")
    for name in ("\x1b[2J.json", "a\nb", "C:x", "a\\b"):
        (tmp_path / "store/pins" / name).write_bytes(b"{}")
    assert list(store.list("pins")) == [listed.name for listed in store.list_details("pins")] == ["a.json"]
