import io
import json
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from limbeck.storage_schemas import parquet, webdataset
from limbeck.storage_schemas.commit import ALL_COLUMNS, Chunk
from limbeck.storage_schemas.dataset import Pruned, latest_manifest, open_dataset, seal_floor
from limbeck.storage_schemas.errors import CorruptShard, ManifestMismatch
from limbeck.storage_schemas.ids import id_set
from limbeck.storage_schemas.manifest import Floor
from limbeck.storage_schemas.ranges import checksum
from limbeck.storage_schemas.recipe import UniformLabels
from limbeck.storage_schemas.record import Columns, Field
from limbeck.storage_schemas.store import Store
from limbeck.trainer.reading.chunks import Chunks, Reading
from limbeck.trainer.reading.rows import Rows, copy_rows
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.reading.substitutes import Substitutes
from tests.forged import forget_digests
from tests.trainer import conftest

COLUMNS = ("noise", "state_004", "output")
PART = 16  # rows of a row group and of a tar's block
by_format = pytest.mark.parametrize("format", ["parquet", "webdataset"])


def bits(field: Field, ids: np.ndarray) -> np.ndarray:
    """What a column holds at each id: any bits, nans too, uint8 [n, nbytes]."""
    key = int.from_bytes(field.name.encode()[-8:], "little") % 1_000_003
    number = (ids[:, None] * 1_000_003 + key) * 257 + np.arange(field.nbytes)
    return (number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.uint8)


def condition(ids: np.ndarray) -> np.ndarray:
    return ids * 12345 + 7


def known_columns(recipe, task, ids) -> Columns:
    states = {
        field.name: bits(field, ids).reshape(-1).view(field.numpy_dtype).reshape(len(ids), *field.shape)
        for field in recipe.fields
        if not field.is_scalar
    }
    return {"sample_id": ids, "condition": condition(ids), **states}


@pytest.fixture
def make(make_store, monkeypatch) -> Callable[..., Store]:
    """Stores of known bits, of 256 train rows in shards of 64 in parts of 16."""
    recipe = conftest.gaussian_recipe
    labels = {"condition": UniformLabels(num_classes=10**7)}
    monkeypatch.setattr(conftest, "gaussian_recipe", lambda **given: recipe(**given).model_copy(update=labels))
    monkeypatch.setattr(conftest, "exact_columns", known_columns)
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", PART)
    monkeypatch.setattr(webdataset, "ROWS_PER_BLOCK", PART)
    return make_store


@pytest.fixture
def source(tmp_path) -> Callable[..., ShardSource]:
    def open_source(store: Store, columns=COLUMNS, split="train", seed=0, **options) -> ShardSource:
        reading = Reading(cache_folder=tmp_path / "cache", **options)
        return ShardSource(open_dataset(store), split, columns, reading=reading, seed=seed)

    return open_source


def assert_known(rows: Rows, source: ShardSource) -> None:
    """Every row is that of its id, to the bit."""
    np.testing.assert_array_equal(rows.condition, condition(rows.ids))
    for field in source.fields:
        out = np.empty((len(rows), field.nbytes), np.uint8)
        copy_rows(rows.addresses[field.name], out)
        np.testing.assert_array_equal(out, bits(field, rows.ids), err_msg=field.name)


def shuffled(source: ShardSource, count: int | None = None) -> np.ndarray:
    return source.ids.at(np.random.default_rng(0).integers(0, source.ids.count, count or 3 * source.ids.count))


def opened(monkeypatch) -> list[tuple[str, int]]:
    """(column, first row) of every chunk that is opened from here on."""
    seen, real = [], Chunks.open

    def spy(self, wanted):
        seen.extend((chunk.column, chunk.first_row) for _, chunk in wanted)
        return real(self, wanted)

    monkeypatch.setattr(Chunks, "open", spy)
    return seen


def flip(store: Store, shard: int, column: str, first_row: int) -> Chunk:
    """One bit in the middle of a chunk of a train shard."""
    dataset = open_dataset(store)
    commit = dataset.commit(dataset.shards("train")[shard])
    (chunk,) = (chunk for chunk in commit.chunks if (chunk.column, chunk.first_row) == (column, first_row))
    path = Path(store.local_path(commit.path))
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.length // 2] ^= 1
    path.write_bytes(data)
    return chunk


def shard_file(store: Store, shard: int) -> Path:
    return Path(store.local_path(open_dataset(store).shards("train")[shard].path))


def commit_file(store: Store, shard: int) -> Path:
    return Path(store.local_path(open_dataset(store).shards("train")[shard].commit_path))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@by_format
def test_rows_are_the_stored_bits_of_their_ids(make, source, format, dtype):
    gaps = {"quarantined": (3, 100, 240), "missing": ("train-00000002",), "window_start": 5}
    ours = source(make(dtype=dtype, format=format, count=250, **gaps))
    assert ours.ids.count == 245 - 2 - 64
    rows = ours.load(shuffled(ours))
    assert_known(rows, ours)
    assert not rows.substituted.any()
    assert [field.name for field in ours.fields] == list(COLUMNS)
    for ids in ([7], [249, 99, 101], list(range(79, 84))):
        rows = ours.load(np.array(ids))
        assert rows.ids.tolist() == ids
        assert_known(rows, ours)
    assert_known(ours.load(np.arange(0)), ours)


@by_format
def test_both_splits_and_any_columns(make, source, format):
    store = make(format=format)
    for split, columns in (("holdout", ("output",)), ("train", ("state_006", "noise")), ("train", ("condition",))):
        ours = source(store, columns, split)
        rows = ours.load(shuffled(ours))
        assert set(rows.addresses) == {"condition", *columns}
        np.testing.assert_array_equal(rows.condition, condition(rows.ids))
        if columns != ("condition",):
            assert_known(rows, ours)
    with pytest.raises(ManifestMismatch, match=r"no columns \['state_005'\]: it has \['sample_id', 'condition', 'noi"):
        source(store, ("state_005",))


def test_where_it_is_and_what_it_holds(make, source):
    two_store = make("b", format="webdataset", samples_per_shard=16)
    one, two = source(make("a")), source(two_store)
    assert one.place == {"dataset": "main", "manifest": 1}
    assert one.digest == two.digest == open_dataset(two_store).manifest.content_digest


@by_format
def test_only_what_is_needed_is_opened(make, source, format, monkeypatch):
    ours, seen = source(make(format=format), ("output",)), opened(monkeypatch)
    ours.load(np.array([64 + 33, 64 + 47]))
    columns = ["condition", "output"] if format == "parquet" else [ALL_COLUMNS]
    checked = ["sample_id"] if format == "parquet" else []
    assert sorted(seen) == sorted([(column, 32) for column in columns + checked] + [("footer", 0)] * bool(checked))
    seen.clear()
    ours.load(np.array([64 + 34, 64 + 35]))
    assert seen == [(column, 32) for column in columns], "ids and footers are checked once"
    seen.clear()
    ours.load(np.array([255, 0, 1, 255]))
    footers = [("footer", 0)] * 2 * bool(checked)
    assert sorted(seen) == sorted([(column, row) for column in columns + checked for row in (0, 48)] + footers)


@pytest.mark.parametrize("verify", ["always", "first", "never"])
@by_format
def test_each_way_to_verify_gives_the_same_rows(make, source, format, verify):
    ours = source(make(format=format), verify=verify)
    for _ in range(2):
        assert_known(ours.load(shuffled(ours)), ours)


@by_format
def test_a_store_that_is_not_a_folder(make, source, format):
    folder = Path(make(format=format).local_path("store.json")).parent
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/{folder.name}-{format}/{path.relative_to(folder)}", path.read_bytes())
    ours = source(Store.open(f"memory://{folder.name}-{format}"))
    assert_known(ours.load(shuffled(ours)), ours)
    fs.rm(f"/{folder.name}-{format}", recursive=True)


def test_compressed_parquet_is_decoded_once(make, source, monkeypatch):
    store = make(compression="zstd", quarantined=(3, 100))
    ours = source(store)
    assert_known(ours.load(shuffled(ours)), ours)
    seen = opened(monkeypatch)
    again = source(store)
    assert_known(again.load(shuffled(again)), again)
    assert seen == [("footer", 0)] * 4, "the cache has what was decoded"
    other = source(store, ("state_002",))
    assert_known(other.load(np.array([1, 17])), other)
    assert set(seen) == {("state_002", 0), ("state_002", 16), ("footer", 0)}, "the integers are there"


def foreign_encode(whole_rows: bool, lose: int = 0):
    """Tars as webdataset's own writer makes them: PAX records, JSON of any length, no blocks of rows."""

    def encode(path, fields, columns, *, task, recipe_id, compression):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for row, sample in enumerate(columns["sample_id"].tolist()[lose:], lose):
                integers = {field.name: int(columns[field.name][row]) for field in fields if field.is_scalar}
                add(tar, f"{sample}.json", json.dumps(integers).encode())
                for field in fields:
                    if not field.is_scalar:
                        add(tar, f"{sample}.{field.name}.npy", npy(columns[field.name][row]))
        data, rows = Path(path).read_bytes(), len(columns["sample_id"]) if whole_rows else 0
        half = len(data) // 2 if not whole_rows else len(data)
        return tuple(
            Chunk(column=ALL_COLUMNS, first_row=0, rows=rows, offset=at, length=len(part), xxh3=checksum(part))
            for at, part in ((0, data[:half]), (half, data[half:]))
            if part
        )

    return encode


def add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(contents), 1.5
    tar.addfile(member, io.BytesIO(contents))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("whole_rows", [True, False], ids=["one block", "no rows said"])
def test_a_tar_of_somebody_else_is_parsed_once(make, source, monkeypatch, whole_rows):
    monkeypatch.setattr(webdataset, "encode", foreign_encode(whole_rows))
    store = make(format="webdataset", dtype="float16", quarantined=(70,))
    ours = source(store)
    assert_known(ours.load(shuffled(ours)), ours)
    parsed = []
    monkeypatch.setattr(webdataset, "decode_foreign_tar", lambda data: parsed.append(1))
    again = source(store)
    assert_known(again.load(shuffled(again)), again)
    assert not parsed, "the cache has what was parsed"


def test_a_tar_with_fewer_rows_than_its_commit_is_refused(make, source, monkeypatch):
    monkeypatch.setattr(webdataset, "encode", foreign_encode(True, lose=1))
    ours = source(make(format="webdataset", dtype="float16"))
    with pytest.raises(CorruptShard, match=r" is \w+\[63(, 2)?\], not \w+\[64(, 2)?\]"):
        ours.load(np.arange(10))


def test_what_can_not_be_viewed_is_decoded(make, source, monkeypatch):
    """As if rows of a block had several sizes."""
    monkeypatch.setattr(webdataset, "regular_block", lambda *_: None)
    ours = source(make(format="webdataset"))
    assert_known(ours.load(shuffled(ours)), ours)


def test_pages_of_another_kind_are_refused(make, source, monkeypatch):
    monkeypatch.setattr(parquet, "find_pages", lambda *_, **__: None)
    with pytest.raises(CorruptShard, match="column condition from row 0 on is no 16 rows of 8 bytes"):
        source(make()).load(np.arange(10))


def test_a_member_of_another_dtype_is_not_taken_for_ours(make, source, monkeypatch):
    with monkeypatch.context() as patch:
        header = webdataset._npy_header("<i2", (2,))
        patch.setattr(webdataset, "_npy_headers", lambda field: (header,))
        store = make(format="webdataset", dtype="float16")
    with pytest.raises(
        CorruptShard, match=r"is not the tar of its commit: \w+ is int16\[64, 2\], not float16\[64, 2\]"
    ):
        source(store).load(np.arange(10))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("column", ["condition", *COLUMNS])
def test_a_flipped_bit_in_parquet_is_named(make, source, column, compression):
    store = make(compression=compression)
    flip(store, 1, column, 32)
    told = f"column {column}, rows 32 to 47 .* does not match its checksum"
    with pytest.raises(CorruptShard, match=told):
        source(store).load(np.arange(0, 256, 5))
    beside = source(store, ("state_002",)) if column != "condition" else source(store)
    ids = np.arange(64) if column == "condition" else np.arange(256)
    assert_known(beside.load(ids), beside)


def test_a_flipped_bit_in_a_tar_is_named(make, source):
    store = make(format="webdataset")
    flip(store, 1, ALL_COLUMNS, 32)
    ours = source(store)
    assert_known(ours.load(np.array([64 + 31, 64 + 48])), ours)
    with pytest.raises(CorruptShard, match=r"column \*, rows 32 to 47 .* does not match its checksum"):
        ours.load(np.array([64 + 32]))


def damage(store: Store, format: str) -> list[list[int]]:
    """A bad part in shard 0 and one in shard 3, and shard 1 gone. The ids that are lost, where 3 is quarantined."""
    flip(store, 0, "output" if format == "parquet" else ALL_COLUMNS, 16)
    flip(store, 3, "condition" if format == "parquet" else ALL_COLUMNS, 0)
    shard_file(store, 1).unlink()
    return [[PART + 1, 2 * PART + 1], [64, 128], [192, 192 + PART]]


@pytest.mark.parametrize(("format", "compression"), [("parquet", "none"), ("parquet", "zstd"), ("webdataset", "none")])
def test_substitutes_are_the_same_whoever_asks_and_when(make, source, format, compression):
    store = make(format=format, quarantined=(3,), compression=compression)
    lost = damage(store, format)
    ours = source(store, on_corrupt="substitute")
    assert ours.unreadable == []
    ids = shuffled(ours)
    rows = ours.load(ids)
    assert_known(rows, ours)
    assert ours.unreadable == lost
    bad = np.any([(ids >= first) & (ids < past) for first, past in lost], axis=0)
    assert 0.2 < bad.mean() < 0.5
    np.testing.assert_array_equal(rows.substituted, bad)
    np.testing.assert_array_equal(rows.ids[~bad], ids[~bad])
    assert not np.any([(rows.ids >= first) & (rows.ids < past) for first, past in lost])
    for parts in (2, 7, 50):
        other = source(store, on_corrupt="substitute")
        pieces = [other.load(piece).ids for piece in np.array_split(ids, parts)]
        np.testing.assert_array_equal(np.concatenate(pieces), rows.ids)
    backwards = source(store, on_corrupt="substitute")
    np.testing.assert_array_equal(backwards.load(ids[::-1]).ids[::-1], rows.ids)
    assert np.any(source(store, on_corrupt="substitute", seed=1).load(ids).ids != rows.ids)


def test_substitutes_do_not_depend_on_the_format(make, source):
    found = {}
    for format in ("parquet", "webdataset"):
        store = make(format, format=format, quarantined=(3,))
        damage(store, format)
        ours = source(store, on_corrupt="substitute")
        found[format] = ours.load(shuffled(ours)).ids.tolist()
    assert found["parquet"] == found["webdataset"]


def test_excluded_ids_keep_their_substitutes_when_the_shard_is_back(make, source):
    store = make()
    clean = {index: shard_file(store, index).read_bytes() for index in (0, 1, 3)}
    damage(store, "parquet")
    broken = source(store, on_corrupt="substitute")
    ids = shuffled(broken)
    before = broken.load(ids)
    for index, data in clean.items():
        path = Path(store.local_path(open_dataset(store).shards("train")[index].path))
        path.write_bytes(data)
    whole, resumed = source(store), source(store)
    np.testing.assert_array_equal(whole.load(ids).ids, ids)
    resumed.exclude(broken.unreadable)
    after = resumed.load(ids)
    np.testing.assert_array_equal(after.ids, before.ids)
    np.testing.assert_array_equal(after.substituted, before.substituted)
    assert_known(after, resumed)
    assert resumed.unreadable == broken.unreadable


def test_threads_find_the_same(make, source):
    store = make(format="webdataset")
    lost = damage(store, "webdataset")
    ids = shuffled(source(store), 4000)
    expected = source(store, on_corrupt="substitute").load(ids).ids
    ours = source(store, on_corrupt="substitute")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda piece: ours.load(piece).ids, np.array_split(ids, 100)))
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert ours.unreadable == [[16, 32], *lost[1:]]


def lose_file(store: Store) -> str:
    shard_file(store, 2).unlink()
    return "is missing"


def cut_file(store: Store) -> str:
    path = shard_file(store, 2)
    path.write_bytes(path.read_bytes()[:-1])
    return "1 bytes are missing"


def lose_commit(store: Store) -> str:
    commit_file(store, 2).unlink()
    return "`generate --recheck` makes train-00000002 again"


def cut_commit(store: Store) -> str:
    path = commit_file(store, 2)
    path.write_bytes(path.read_bytes()[:-9])
    return "is not a valid Commit"


def take_another_commit(store: Store) -> str:
    commit_file(store, 2).write_bytes(commit_file(store, 1).read_bytes())
    return "is the document of recipes/"


def lose_a_chunk(store: Store) -> str:
    path = commit_file(store, 2)
    commit = json.loads(path.read_bytes())
    commit["chunks"] = [chunk for chunk in commit["chunks"] if (chunk["first_row"], chunk["rows"]) != (16, 16)]
    path.write_text(json.dumps(commit))
    forget_digests(store)
    return "chunks that don't cover its 64 rows"


def swap_chunks(store: Store) -> str:
    path = commit_file(store, 2)
    commit = json.loads(path.read_bytes())
    first, second = [i for i, chunk in enumerate(commit["chunks"]) if chunk["column"] in ("output", ALL_COLUMNS)][:2]
    commit["chunks"][first], commit["chunks"][second] = commit["chunks"][second], commit["chunks"][first]
    path.write_text(json.dumps(commit))
    forget_digests(store)
    return "chunks that don't cover its 64 rows"


def say_otherwise(told: str, **changes) -> Callable[[Store], str]:
    def harm(store: Store) -> str:
        path = commit_file(store, 2)
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
        return told

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        lose_file, cut_file, lose_commit, cut_commit, take_another_commit, lose_a_chunk, swap_chunks,
        say_otherwise("more than 64 ids have", rows=65), say_otherwise("is the document of recipes/", index=3),
        say_otherwise("is not what the manifest lists", quarantined=[130]),
    ],
)  # fmt: skip
@by_format
def test_a_shard_that_is_lost_is_told_or_replaced(make, source, format, harm):
    store = make(format=format)
    told = harm(store)
    with pytest.raises(CorruptShard, match=told) as caught:
        source(store).load(np.arange(256))
    assert "\n" not in str(caught.value)
    ours = source(store, on_corrupt="substitute")
    rows = ours.load(np.arange(256))
    assert_known(rows, ours)
    assert np.flatnonzero(rows.substituted).tolist() == list(range(128, 192))
    assert ours.unreadable == [[128, 192]]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_row_groups_of_other_lengths_than_were_committed_are_refused(make, source, compression):
    """Else the rows after them would be taken for others."""
    store = make(compression=compression)
    commit = json.loads(commit_file(store, 2).read_bytes())
    for chunk in commit["chunks"]:
        longer = {0: (0, 15), 16: (15, 17)}.get(chunk["first_row"]) if chunk["rows"] else None
        chunk["first_row"], chunk["rows"] = longer or (chunk["first_row"], chunk["rows"])
    commit_file(store, 2).write_text(json.dumps(commit))
    forget_digests(store)
    with pytest.raises(CorruptShard, match="its footer says other rows or places of its columns than its commit"):
        source(store).load(np.arange(128, 192))


@pytest.mark.parametrize("on_corrupt", ["fail", "substitute"])
def test_a_pruned_manifest_is_never_substituted(make, source, on_corrupt):
    store = make()
    ours = source(store, on_corrupt=on_corrupt)
    latest = latest_manifest(store, "main")
    seal_floor(store, latest, writer="pruner", floor=Floor(number=2))
    shard_file(store, 2).unlink()
    with pytest.raises(Pruned, match=r"manifest 1 of 'main' .* was pruned"):
        ours.load(np.arange(256))


def test_more_than_half_is_refused(make, source):
    store = make()
    for shard in (0, 1, 3):
        shard_file(store, shard).unlink()
    for _ in range(2):
        with pytest.raises(CorruptShard, match="192 of 256 samples can't be read, more than half") as caught:
            source(store, on_corrupt="substitute").load(np.arange(256))
        assert "\n" not in str(caught.value)
    half = source(make("half"))
    half.exclude([(0, 128)])
    assert half.load(np.arange(256)).ids.min() == 128
    with pytest.raises(CorruptShard, match="129 of 256 samples"):
        half.exclude([(3, 129)])


def test_it_pickles_with_what_it_knows(make, source):
    store = make(format="webdataset")
    damage(store, "webdataset")
    ours = source(store, on_corrupt="substitute")
    ids = shuffled(ours)
    rows, copy = ours.load(ids), pickle.loads(pickle.dumps(ours))
    assert copy.unreadable == ours.unreadable
    np.testing.assert_array_equal(copy.load(ids).ids, rows.ids)


def test_candidates_are_pinned_and_even():
    ids = id_set(0, 200_000, [(100, 200)])
    ours = Substitutes(ids, seed=0, ranges=[(0, 10)])
    assert ours.chosen(np.array([0, 1, 2, 500, 9])).tolist() == [35643, 118355, 63518, 500, 70725]
    assert Substitutes(ids, seed=1, ranges=[(0, 10)]).chosen(np.array([0, 1, 2])).tolist() == [169136, 20186, 171582]
    half = Substitutes(ids, seed=0, ranges=[(0, 100_000)])
    chosen = half.chosen(np.arange(200, 100_000))
    assert np.unique(chosen).size == pytest.approx(100_000 * (1 - np.exp(-0.998)), rel=0.01)
    counts = np.histogram(chosen, bins=100, range=(100_000, 200_000))[0]
    assert ((counts - 998) ** 2 / 998).sum() < 150, "chi-square with 99 degrees of freedom"
