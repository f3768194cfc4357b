"""What a folder holds, how large it is and since when: every storage says it in its own way."""

from datetime import UTC, datetime, timedelta

import pytest

from limbeck.storage_schemas import backends
from limbeck.storage_schemas.store import Store


def check(store: Store) -> None:
    began = datetime.now(UTC)
    store.write("a/two", b"22")
    store.write("a/one", b"1")
    store.write("a/b/three", b"333")
    found = store.list_details("a")
    assert [(it.name, it.size) for it in found] == [("one", 1), ("two", 2)]
    assert all(it.modified and abs(it.modified - began) < timedelta(minutes=2) for it in found)
    assert list(store.list_details("nowhere")) == []
    store.remove("a/one")
    assert [it.name for it in store.list_details("a")] == ["two"]


def test_a_listing_with_sizes_and_times(store: Store) -> None:
    check(store)


def test_a_listing_of_a_bucket(s3_uri: str) -> None:
    check(Store.create(s3_uri))


TIME = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("entry", "time"),
    [
        ({"LastModified": TIME}, TIME),  # S3
        ({"last_modified": TIME}, TIME),  # Azure
        ({"updated": "2026-01-31T09:30:00.000Z"}, TIME),  # GCS
        ({"mtime": TIME.timestamp(), "created": 0.0}, TIME),  # a folder
        ({"created": TIME.timestamp()}, TIME),  # memory://
        ({}, None),
    ],
)
def test_times_by_every_name(entry: dict[str, object], time: datetime | None) -> None:
    assert backends.modified(entry) == time
