"""The store behind a proxy that injects what S3 and the way to it do, against moto; tests/end_to_end has SeaweedFS."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from limbeck.storage_schemas import store as store_module
from limbeck.storage_schemas.errors import StoreError
from limbeck.storage_schemas.store import MissingFile, Store
from tests import servers
from tests.proxy import KINDS, UNCONDITIONAL, Proxy, Rule

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")

OURS, RIVALS = b"attempt ours", b"attempt rival"
AT_ONCE = [kind for kind in KINDS if not kind.startswith("hang")]  # a hanging server costs seconds each time
READS = ("error", "slow_down", "hang", "reset", "reset_middle", "lose")


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[Proxy]:
    """One proxy and one client for all, with the pauses and timeouts of a test."""
    quick = {"config_kwargs": {"read_timeout": 1, "retries": {"total_max_attempts": 1}}}
    with Proxy(s3_server) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in servers.environment(running.endpoint).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", quick)
        patch.setattr(store_module, "LONGEST_PAUSE", 0.05)
        s3fs.S3FileSystem.clear_instance_cache()
        yield running
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def behind(proxy: Proxy) -> Store:
    """A store whose every request goes through the proxy, which forwards all until it is told to do otherwise."""
    proxy.rules, proxy.latency = [], 0.0
    store = Store.create(f"s3://{servers.BUCKET}/{secrets.token_hex(4)}")
    proxy.seen.clear()
    proxy.injected.clear()
    return store


@pytest.mark.parametrize("kind", KINDS)
def test_a_conditional_put_is_ours_whatever_happens_on_the_way(behind: Store, proxy: Proxy, kind: str) -> None:
    proxy.rules = [Rule(kind, "create", times=1)]
    assert behind.put_if_absent("commit", OURS) == OURS == behind.read("commit")
    assert proxy.injected == {(kind, "create"): 1}


@pytest.mark.parametrize("kind", AT_ONCE)
def test_a_standing_object_stays_whatever_a_late_writer_meets(behind: Store, proxy: Proxy, kind: str) -> None:
    assert behind.put_if_absent("commit", RIVALS) == RIVALS
    proxy.rules = [Rule(kind, "create", times=1)]
    assert behind.put_if_absent("commit", OURS) == RIVALS == behind.read("commit")
    assert proxy.injected == {(kind, "create"): 1}
    assert proxy.seen["delete"] == 0, "never delete on doubt"


@pytest.mark.parametrize("kind", AT_ONCE)
def test_a_store_is_created_whatever_happens_on_the_way(behind: Store, proxy: Proxy, kind: str) -> None:
    """The proof that a second creator is refused must not take a lost answer for a second winner."""
    proxy.rules = [Rule(kind, "create", times=1), Rule(kind, "create", skip=1, times=1)]
    store = Store.create(f"{behind.uri}-new")
    assert store.exists("store.json")
    assert proxy.injected[kind, "create"] >= 1
    assert proxy.seen["delete"] == 0


@pytest.mark.parametrize("kind", READS)
def test_reads_lists_sizes_and_uploads_come_back(behind: Store, proxy: Proxy, kind: str, tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(range(256)) * 1000)
    # A timeout takes its second: one on the way there and one on the way back will do.
    operations = ("put", "range") if kind == "hang" else ("put", "read", "range", "list", "head")
    proxy.rules = [Rule(kind, operation, times=1) for operation in operations]
    behind.upload(tmp_path / "shard", "folder/shard")
    assert behind.read("folder/shard") == (tmp_path / "shard").read_bytes()
    assert list(behind.read_ranges("folder/shard", [(255, 3), (0, 2)])) == [b"\xff\x00\x01", b"\x00\x01"]
    assert list(behind.list("folder")) == ["shard"]
    assert behind.size("folder/shard") == 256_000
    assert proxy.injected == {(kind, operation): 1 for operation in operations}


def test_a_lost_answer_and_our_own_retry_still_win(
    behind: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own retry meets what its first request wrote: 412, although we won."""
    retrying = {"config_kwargs": {"retries": {"total_max_attempts": 2}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", retrying)
    store = Store.open(behind.uri)
    proxy.seen.clear()
    proxy.rules = [Rule("lose", "create", times=1)]
    assert store.put_if_absent("commit", OURS) == OURS
    assert proxy.injected == {("lose", "create"): 1}
    assert proxy.seen == {"create": 2, "range": 1}


@pytest.mark.parametrize("operation", ["part", "complete"])
@pytest.mark.parametrize("kind", ["error", "reset_middle", "lose"])
def test_an_upload_in_parts_comes_whole_or_not_at_all(
    behind: Store, proxy: Proxy, operation: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    data = bytes(range(256)) * (11 << 12)
    (tmp_path / "shard").write_bytes(data)
    proxy.rules = [Rule(kind, operation, times=1)]
    behind.upload(tmp_path / "shard", "shard")
    assert proxy.injected == {(kind, operation): 1}
    assert behind.read("shard") == data
    assert parts_left(behind) == 0
    proxy.rules = [Rule("error", operation)]
    monkeypatch.setattr(behind, "_tries", 2)
    with pytest.raises(StoreError, match="injected by the test"):
        behind.upload(tmp_path / "shard", "other")
    assert behind.read("other") is None
    assert parts_left(behind) == 0


def parts_left(store: Store) -> int:
    return len(store._fs.call_s3("list_multipart_uploads", Bucket=store._root.split("/")[0]).get("Uploads", []))


def test_what_stays_broken_is_told_within_our_patience(
    behind: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.rules = [Rule("error")]
    for action in (lambda: behind.read("x"), lambda: behind.list("x"), lambda: behind.put_if_absent("x", OURS)):
        with pytest.raises(StoreError, match=r"injected by the test: check the address, the network") as told:
            action()
        assert len(str(told.value).splitlines()) == 1
    assert proxy.injected["error", "read"] == store_module.TRIES
    assert proxy.injected["error", "range"] == store_module.TRIES, "after each create"
    proxy.rules = [Rule("hang")]
    monkeypatch.setattr(store_module, "PATIENCE", 1.0)
    started = time.monotonic()
    with pytest.raises(StoreError, match="ReadTimeoutError"):
        behind.read("x")
    assert proxy.injected["hang", "read"] <= 2
    assert time.monotonic() - started < 30


def test_what_cannot_pass_is_told_at_once(behind: Store, proxy: Proxy) -> None:
    with pytest.raises(MissingFile):
        behind.read_range("nowhere", 0, 1)
    assert proxy.seen == {"range": 1}
    with pytest.raises(StoreError, match="no such bucket"):
        Store.open("s3://no-such-bucket/x")
    assert proxy.seen == {"range": 2}
    proxy.rules = [Rule("denied")]
    proxy.seen.clear()
    for action in (lambda: behind.read("x"), lambda: behind.put_if_absent("x", OURS), lambda: behind.list("x")):
        with pytest.raises(StoreError, match="PermissionError: injected by the test: check the credentials"):
            action()
    assert proxy.seen == {"read": 1, "create": 1, "list": 1}


def test_latency_and_counts(behind: Store, proxy: Proxy) -> None:
    proxy.latency = 0.2
    started = time.monotonic()
    assert behind.read("nothing") is None
    assert time.monotonic() - started >= 0.2
    assert proxy.seen == {"read": 1}, "a read is one request"


def test_a_server_that_ignores_conditions_is_refused(behind: Store, proxy: Proxy) -> None:
    proxy.rules = [Rule(UNCONDITIONAL, "create")]
    uri = f"{behind.uri}-leaky"
    with pytest.raises(StoreError, match=r"accepted a conditional create of the same name twice.*--single-writer"):
        Store.create(uri)
    assert Store(uri).read("store.json") is None
