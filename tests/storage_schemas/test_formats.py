import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from limbeck.storage_schemas import layout as layout_module
from limbeck.storage_schemas import parquet, webdataset
from limbeck.storage_schemas.commit import Commit, Task, column_statistics
from limbeck.storage_schemas.errors import CorruptShard
from limbeck.storage_schemas.formats import check_shard, encode_shard, read_shard
from limbeck.storage_schemas.layout import FORMATS, Layout
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.record import Columns, Field, bfloat16_values, to_storage
from limbeck.storage_schemas.store import Store

Make = Callable[..., Recipe]
Rows = Callable[..., Columns]
Committer = Callable[..., Commit]
LAYOUTS = [
    Layout(format=name, samples_per_shard=1100, compression=compression)
    for name, it in FORMATS.items()
    for compression in it.COMPRESSIONS
]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
TASK = Task("train", 1, 1100)
QUARANTINED = (1100, 1611, 2199)


def assert_same(columns: Columns, expected: Columns) -> None:
    for name in columns:
        assert columns[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(columns[name], expected[name])


@by_layout
@pytest.mark.parametrize("storage_dtype", ["float16", "bfloat16", "float32"])
def test_what_was_written_comes_back(
    store: Store, layout: Layout, storage_dtype: str, make_recipe: Make, make_columns: Rows, commit_task: Committer,
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = make_recipe(storage_dtype=storage_dtype)
    commit = commit_task(store, recipe, layout, TASK, tmp_path, QUARANTINED)
    expected = make_columns(recipe, TASK, QUARANTINED)
    assert commit.rows == 1097
    assert check_shard(store, commit) == []
    everything = read_shard(store, commit, recipe)
    assert list(everything) == [field.name for field in recipe.fields]
    assert_same(everything, expected)
    assert_same(read_shard(store, commit, recipe, ["output", "noise"], verify=False), expected)


@by_layout
def test_segments_and_shards_without_rows(
    store: Store, layout: Layout, make_recipe: Make, make_columns: Rows, commit_task: Committer, tmp_path: Path
) -> None:
    segments = make_recipe(chain="segment", states=())
    commit = commit_task(store, segments, layout, TASK, tmp_path)
    columns = read_shard(store, commit, segments)
    assert columns["start_index"].dtype == np.int32
    assert_same(columns, make_columns(segments, TASK))
    empty = commit_task(store, make_recipe(), layout, TASK, tmp_path, tuple(range(TASK.start, TASK.stop)))
    assert empty.rows == 0
    assert check_shard(store, empty) == []
    assert read_shard(store, empty, make_recipe())["output"].shape == (0, 2, 3, 5)


@by_layout
def test_the_same_rows_give_the_same_bytes(layout: Layout, recipe: Recipe, make_columns: Rows, tmp_path: Path) -> None:
    columns = make_columns(recipe, TASK)
    one, two = (
        encode_shard(tmp_path / name, recipe.fields, columns, task=TASK, recipe_id=recipe.id, layout=layout)
        for name in ("one", "two")
    )
    assert (one.sha256, one.chunks, one.bytes) == (two.sha256, two.chunks, two.bytes)
    data = one.path.read_bytes()
    assert one.sha256 == hashlib.sha256(data).hexdigest()
    assert one.bytes == len(data)
    end = 4 if layout.format == "parquet" else 0
    for chunk in one.chunks:
        assert chunk.offset == end, "chunks cover the file without a hole"
        end += chunk.length
    assert end == one.bytes
    assert one.chunks[-1].column == "footer"


def test_sizes_are_what_the_formats_promise(recipe: Recipe, make_columns: Rows, tmp_path: Path) -> None:
    columns = make_columns(recipe, TASK)
    tar = encode_shard(tmp_path / "t", recipe.fields, columns, task=TASK, recipe_id=recipe.id, layout=LAYOUTS[2])
    # three states of 512 header + 512 (npy header 128 + 60 bytes of data), and 512 + 512 of JSON
    rows_bytes = 1100 * 4 * 1024
    assert tar.bytes == -(-(rows_bytes + 1024) // 10240) * 10240
    assert [chunk.rows for chunk in tar.chunks] == [256, 256, 256, 256, 76, 0]
    file = encode_shard(tmp_path / "p", recipe.fields, columns, task=TASK, recipe_id=recipe.id, layout=LAYOUTS[0])
    states = [chunk for chunk in file.chunks if chunk.column == "state_002"]
    assert [chunk.rows for chunk in states] == [512, 512, 76]
    for chunk in states:  # 60 bytes a row and one page header
        assert 0 < chunk.length - 60 * chunk.rows < 64


@by_layout
def test_a_flipped_bit_is_caught_and_named(
    layout: Layout, recipe: Recipe, commit_task: Committer, tmp_path: Path
) -> None:
    store = Store.create(str(tmp_path / "store"))
    commit = commit_task(store, recipe, layout, TASK, tmp_path)
    path = Path(store.local_path(commit.path) or "")
    clean = path.read_bytes()
    chunk = next(chunk for chunk in commit.chunks if chunk.column in ("state_002", "*") and chunk.first_row == 512)
    for offset in (chunk.offset, chunk.offset + chunk.length // 2, chunk.offset + chunk.length - 1):
        damaged = bytearray(clean)
        damaged[offset] ^= 4
        path.write_bytes(damaged)
        (problem,) = check_shard(store, commit)
        assert f"{commit.path}: column {chunk.column}, rows 512 to {511 + chunk.rows} " in problem
        with pytest.raises(CorruptShard, match="rows 512 to"):
            read_shard(store, commit, recipe)
        if layout.format == "parquet":
            read_shard(store, commit, recipe, ["noise"])  # another column is none of its business
    damaged = bytearray(clean)
    damaged[0 if layout.format == "parquet" else -1] ^= 1
    path.write_bytes(damaged)
    assert len(check_shard(store, commit)) == 1


@by_layout
def test_a_cut_or_absent_shard_is_named(
    store: Store, layout: Layout, recipe: Recipe, commit_task: Committer, tmp_path: Path
) -> None:
    commit = commit_task(store, recipe, layout, TASK, tmp_path)
    data = store.read(commit.path) or b""
    for length in (commit.chunks[-1].offset, len(data) // 2, 0):
        store.write(commit.path, data[:length])
        assert check_shard(store, commit) == [
            f"{store.uri}/{commit.path} has {length} bytes, its commit says {len(data)}"
        ]
        for verify in (True, False):
            with pytest.raises(CorruptShard, match="missing"):
                read_shard(store, commit, recipe, ["output"], verify=verify)
    store.remove(commit.path)
    assert check_shard(store, commit) == [f"{store.uri}/{commit.path} is missing"]
    with pytest.raises(CorruptShard, match="is missing"):
        read_shard(store, commit, recipe, ["output"])


def test_parquet_fetches_only_what_is_asked(
    recipe: Recipe, commit_task: Committer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create("memory://ranges")
    commit = commit_task(store, recipe, LAYOUTS[0], TASK, tmp_path)
    fetched: list[tuple[int, int]] = []
    real = store.read_ranges
    monkeypatch.setattr(store, "read_ranges", lambda path, ranges: fetched.extend(ranges) or real(path, ranges))
    read_shard(store, commit, recipe, ["noise"])
    needed = ("sample_id", "condition", "noise", "footer")
    assert sorted(fetched) == sorted((c.offset, c.length) for c in commit.chunks if c.column in needed)
    with pytest.raises(ValueError, match="are not columns"):
        read_shard(store, commit, recipe, ["state_003"])


def test_pyarrow_alone_reads_parquet(recipe: Recipe, make_columns: Rows, tmp_path: Path) -> None:
    columns = make_columns(recipe, TASK)
    path = tmp_path / "shard.parquet"
    shard = encode_shard(path, recipe.fields, columns, task=TASK, recipe_id=recipe.id, layout=LAYOUTS[0])
    table = pq.read_table(path, page_checksum_verification=True)
    assert table.schema.metadata[b"recipe"].decode() == recipe.id
    assert table.schema.metadata[b"task"] == b"train-00000001"
    field = table.schema.field("output")
    assert json.loads(field.metadata[b"shape"]) == [2, 3, 5]
    assert field.metadata[b"dtype"] == b"float16"
    assert table["output"][3].as_py() == columns["output"][3].tobytes()
    assert table["condition"].to_pylist() == columns["condition"].tolist()
    statistics = pq.read_metadata(path).row_group(0)
    assert statistics.column(0).statistics.max == 1611
    assert statistics.column(2).statistics is None
    data = bytearray(path.read_bytes())
    chunk = next(chunk for chunk in shard.chunks if chunk.column == "output")
    data[chunk.offset + chunk.length // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_webdataset_reads_our_tar(recipe: Recipe, make_columns: Rows, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    task = Task("holdout", 1, 64)
    columns = make_columns(recipe, task, (70,))
    path = tmp_path / "shard.tar"
    encode_shard(path, recipe.fields, columns, task=task, recipe_id=recipe.id, layout=LAYOUTS[2])
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"holdout-{n:012d}" for n in range(64, 128) if n != 70]
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["state_002.npy"], columns["state_002"][row])
        assert sample["json"] == {
            "split": "holdout", "sample_id": columns["sample_id"][row], "condition": columns["condition"][row],
        }  # fmt: skip


@pytest.mark.parametrize("odd_row", [None, 5])
@pytest.mark.parametrize("written", ["now", "at first"])
def test_bfloat16_in_a_tar_is_no_integer_and_says_what_it_is(
    make_recipe: Make, make_columns: Rows, tmp_path: Path, written: str, odd_row: int | None
) -> None:
    recipe, task = make_recipe(storage_dtype="bfloat16"), Task("train", 0, 8)
    columns = make_columns(recipe, task)
    shard = encode_shard(tmp_path / "s", recipe.fields, columns, task=task, recipe_id=recipe.id, layout=LAYOUTS[2])
    data = shard.path.read_bytes()
    with tarfile.open(shard.path) as tar:
        sample = tar.extractfile(tar.getmembers()[2]), tar.extractfile(tar.getmembers()[3])
        stored, told = (member.read() for member in sample if member)
    raw = np.load(io.BytesIO(stored), allow_pickle=False)
    assert raw.dtype == "V2"
    np.testing.assert_array_equal(raw.view("<u2"), columns["output"][0])
    assert json.loads(told)["dtype"] == "bfloat16"
    if written == "at first":
        data = data.replace(b"'descr': '|V2'", b"'descr': '<u2'")
        data = data.replace(b'"dtype": "bfloat16", ', b" " * len(b'"dtype": "bfloat16", '))
        assert b"bfloat16" not in data
    if odd_row is not None:  # two members change places: no strided array any more
        start = odd_row * len(data[: data.index(b"train-000000000001.")])
        data = data[:start] + data[start + 1024 : start + 2048] + data[start : start + 1024] + data[start + 2048 :]
    assert (webdataset.regular_rows(memoryview(data), 8) is None) is (odd_row is not None)
    assert_same(
        webdataset.parse(memoryview(data), recipe.fields, webdataset.sample_names("train", np.arange(8)), name="a.tar"),
        columns,
    )
    plain = make_recipe()
    shard = encode_shard(
        tmp_path / "t", plain.fields, make_columns(plain, task), task=task, recipe_id=plain.id, layout=LAYOUTS[2]
    )
    assert b"dtype" not in shard.path.read_bytes()


def test_the_tar_has_no_pax_records_and_one_stride(recipe: Recipe, make_columns: Rows, tmp_path: Path) -> None:
    task = Task("train", 0, 64)
    columns = make_columns(recipe, task)
    columns["condition"] = np.where(np.arange(64) % 2, -(2**62), 7)  # integers of every length, one JSON size
    shard = encode_shard(
        tmp_path / "s", recipe.fields, columns, task=task, recipe_id=recipe.id, layout=LAYOUTS[2]
    )  # fmt: skip
    data = shard.path.read_bytes()
    with tarfile.open(shard.path) as tar:
        members = tar.getmembers()
    assert len(members) == 4 * 64
    assert {member.type for member in members} == {tarfile.REGTYPE}
    assert {(m.mtime, m.uid, m.gid, m.uname, m.pax_headers == {}) for m in members} == {(0, 0, 0, "", True)}
    assert [member.offset for member in members[::4]] == [row * 4096 for row in range(64)]
    assert not any(data[member.offset + 257 : member.offset + 265] != b"ustar\x0000" for member in members)
    regular = webdataset.regular_rows(memoryview(data), 64)
    assert regular is not None
    assert regular.stride == 4096
    assert_same(regular.columns(recipe.fields), columns)
    assert_same(webdataset.decode_foreign_tar(data), columns)


@pytest.mark.parametrize("row", [3, 7])
def test_a_row_in_another_order_is_not_viewed(recipe: Recipe, make_columns: Rows, tmp_path: Path, row: int) -> None:
    task = Task("train", 0, 8)
    columns = make_columns(recipe, task)
    shard = encode_shard(tmp_path / "s", recipe.fields, columns, task=task, recipe_id=recipe.id, layout=LAYOUTS[2])
    data = bytearray(shard.path.read_bytes())
    noise, state = slice(row * 4096, row * 4096 + 1024), slice(row * 4096 + 1024, row * 4096 + 2048)
    data[noise], data[state] = data[state], data[noise]  # same sizes, so the stride alone doesn't tell
    assert webdataset.regular_rows(memoryview(data), 8) is None
    assert_same(webdataset.decode_foreign_tar(bytes(data)), columns)


NOISE = Field("noise", (2, 2), "float16")


def tar_of(samples: list[dict[str, bytes]]) -> memoryview:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key, members in enumerate(samples):
            for suffix, contents in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    return memoryview(file.getvalue())


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_row_stored_column_by_column_among_others_is_what_it_is() -> None:
    values = np.arange(12, dtype=np.float16).reshape(3, 2, 2)
    rows = [values[0], np.asfortranarray(values[1]), values[2]]  # headers of the same size, which differ
    found = webdataset.parse(tar_of([{"noise.npy": npy(row)} for row in rows]), [NOISE], ["0", "1", "2"], name="a.tar")
    np.testing.assert_array_equal(found["noise"], values)


@pytest.mark.parametrize(
    "other",
    [
        {"noise.npy": b""},
        {"noise.npy": npy(np.zeros((2, 2), np.int16))},
        {"noise.npy": npy(np.array([None], object))},
        *({"json": text} for text in (b"[1]", b"{", b'{"condition": null}', b'{"condition": 1.5}')),
        {"json": b'{"condition": 100000000000000000000}'},
    ],
    ids=str,
)  # fmt: skip
def test_members_that_are_not_ours_are_told_in_one_line(other: dict[str, bytes]) -> None:
    good = {"noise.npy": npy(np.zeros((2, 2), np.float16)), "json": b'{"condition": 1}'}
    for samples in ([good, good | other], [good | other] * 2):
        with pytest.raises(CorruptShard, match=r"a.tar is not the tar of its commit: ") as caught:
            webdataset.parse(tar_of(samples), [NOISE, Field("condition", (), "int64")], ["0", "1"], name="a.tar")
        assert "\n" not in str(caught.value)


def test_an_irregular_tar_is_parsed_as_any_other() -> None:
    file = io.BytesIO()
    states = np.arange(12, dtype=np.float16).reshape(3, 4)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row, state in enumerate(states):
            contents = io.BytesIO()
            np.save(contents, state)
            parts = {"NOISE.npy": contents.getvalue(), "json": json.dumps({"sample_id": 10**row, "by": "you"}).encode()}
            for suffix, value in parts.items():
                member = tarfile.TarInfo(f"folder.d/key{row}.{suffix}")
                member.size, member.mtime = len(value), 1.5
                tar.addfile(member, io.BytesIO(value))
    data = file.getvalue()
    assert webdataset.regular_rows(memoryview(data), 3) is None
    columns = webdataset.decode_foreign_tar(data)
    assert columns["sample_id"].tolist() == [1, 10, 100]
    np.testing.assert_array_equal(columns["noise"], states)


def test_a_pickle_in_a_tar_is_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    contents, file = io.BytesIO(), io.BytesIO()
    np.save(contents, np.array([Bomb()], dtype=object), allow_pickle=True)
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("a.noise.npy")
        member.size = len(contents.getvalue())
        tar.addfile(member, io.BytesIO(contents.getvalue()))
    with pytest.raises(ValueError, match="allow_pickle"):
        webdataset.decode_foreign_tar(file.getvalue())
    assert not (tmp_path / "exploded").exists()


def test_statistics_are_over_numbers_not_bits(make_recipe: Make) -> None:
    recipe = make_recipe(storage_dtype="bfloat16", sample_shape=(2,), states=(0, 4))
    values = np.array([[1.0, 2.0], [3.0, -6.0]])
    stored = to_storage(values, "bfloat16")
    assert bfloat16_values(stored).tolist() == values.tolist()
    columns = {"sample_id": np.arange(2), "condition": np.arange(2), "noise": stored, "output": stored[:0]}
    statistics = column_statistics(recipe.fields, columns)
    noise = statistics["noise"]
    assert (noise.mean, noise.min, noise.max) == (0.0, -6.0, 3.0)
    assert noise.std == pytest.approx(12.5**0.5)
    assert statistics["output"].mean is None
    for bad in (np.inf, -np.inf, np.nan):  # of a shard that somebody else made
        columns["noise"] = to_storage(np.array([[1.0, bad]]), "bfloat16")
        assert column_statistics(recipe.fields, columns)["noise"].max is None


def test_a_format_of_another_release_is_refused_in_one_line(
    store: Store, make_recipe: Make, commit_task: Committer, tmp_path: Path
) -> None:
    recipe = make_recipe()
    commit = commit_task(store, recipe, LAYOUTS[0], TASK, tmp_path)
    newer = commit.model_copy(update={"layout_id": "arrow-1100"})
    with pytest.raises(CorruptShard, match=r"is in format 'arrow', which this release doesn't read: use a newer one"):
        read_shard(store, newer, recipe)


def test_a_format_is_named_by_its_layouts_id() -> None:
    assert [{"parquet": parquet, "webdataset": webdataset}[layout.format] for layout in LAYOUTS] == [
        FORMATS[layout.id.partition("-")[0]] for layout in LAYOUTS
    ]
    assert all(name.isalnum() for name in FORMATS)


def test_no_other_file_asks_for_a_format() -> None:
    """Adding one is its module and its row."""
    root = Path(layout_module.__file__).parents[1]
    own = {"storage_schemas/parquet.py", "storage_schemas/webdataset.py", "storage_schemas/layout.py"}
    asks = re.compile(r"""(==|!=|\bin\b) *\(?["'](parquet|webdataset)["']|endswith\(["']\.(parquet|tar)""")
    files = [path for part in ("pipeline", "storage_schemas", "trainer") for path in (root / part).rglob("*.py")]
    assert not [path for path in files if str(path.relative_to(root)) not in own and asks.search(path.read_text())]
