"""Files that are cut while they are mapped, in processes of their own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import ctypes, os, sys, threading
path = sys.argv[1]
def cut():
    os.truncate(path, 5000)
"""
READERS = {
    "the trainer's map": """
from limbeck.trainer.reading.mapped import Maps
maps = Maps(); data = maps.open(path); cut(); print(data[-1])
""",
    "everybody else's": """
from types import SimpleNamespace
from limbeck.storage_schemas.ranges import map_shard
store = SimpleNamespace(local_path=lambda name: path)
data = map_shard(store, SimpleNamespace(path="x")); cut(); print(data[-1])
""",
    "a thread that holds no lock": """
import xxhash
from limbeck.trainer.reading.mapped import Maps
maps = Maps(); data = maps.open(path); cut()
thread = threading.Thread(target=lambda: print(xxhash.xxh3_128_hexdigest(data))); thread.start(); thread.join()
""",
    "a DataLoader's worker": """
import torch
from limbeck.trainer.reading.mapped import Maps
class Mapped(torch.utils.data.Dataset):
    def __len__(self): return 1
    def __getitem__(self, index):
        data = Maps().open(path); cut()
        return data[-1]
next(iter(torch.utils.data.DataLoader(Mapped(), num_workers=1)))
""",
}


def run(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_cut_while_it_is_mapped_is_named(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "train-00000000.parquet"
    path.write_bytes(bytes(1 << 20))
    ended = run(BEGIN + READERS[reader], path)
    told = f"{path} was cut from 1048576 to 5000 bytes while it was read: restore the file, then start again"
    assert told in ended.stderr.splitlines()
    assert ended.returncode == 1
    if "worker" not in reader:
        assert ended.stderr.splitlines() == [told]


def test_what_is_not_ours_ends_as_ever(tmp_path: Path) -> None:
    path, other = tmp_path / "ours", tmp_path / "other"
    for file in (path, other):
        file.write_bytes(bytes(1 << 20))
    program = """
import mmap, os, sys
from limbeck.trainer.reading.mapped import Maps
maps = Maps(); data = maps.open(sys.argv[1])
file = open(sys.argv[2], "rb"); other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(sys.argv[2], 0); other[-1]
"""
    assert run(program, path, other).returncode == -signal.SIGBUS
