"""Trees of plain values and tensors as files: exact JSON beside safetensors. No pickle, and nothing runs that is read.

    tree.json                               the plain values, with a name for each tensor
    tensors.safetensors                     tensors that each process holds whole
    shard-00001-of-00004.safetensors, ...   or each rank's pieces of tensors that are sharded; see shards.py

A tree is made of dicts, lists, tuples, tensors, strings, numbers, booleans and None. JSON keeps floats to the last bit
(Python writes the shortest text that reads back the same, and NaN and Infinity by name), but neither a dict's integer
keys nor tuples, so those are spelled out.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from limbeck.storage_schemas.errors import StoreError
from limbeck.trainer.runs import shards

Tensors = dict[str, Tensor]

TREE, TENSORS = "tree.json", "tensors.safetensors"
LONGEST = 256 << 20
"""Bytes of a tree.json. A fit's holds some KiB, and its size follows from the network's depth alone."""


def write_tree(tree: Any, folder: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """The tree as files in an empty folder, which exists. A sharded one is every rank's work, a whole one rank 0's.

    Ranks may write to one folder or each to its own: file names differ, and rank 0 writes those that all need.
    """
    document, tensors = taken_apart(tree)
    if shards.is_sharded(tensors.values()):
        shards.write(tensors, folder, rank=rank, world_size=world_size)
    elif rank == 0:
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(copies, folder / TENSORS)
    if rank == 0:
        (folder / TREE).write_text(json.dumps(document))


def read_tree(folder: Path, *, like: Any = None) -> Any:
    """The tree in a folder. Where `like`, a tree with the same keys, holds shards, so does it, however it was written.

    What `like` holds is filled in place by a tree that was written sharded; other tensors are new, on the CPU. Raises
    StoreError in one line for files that are not ours.
    """
    with _store_errors(folder):
        document = _document_in(folder)
        _, wanted = taken_apart(like)
        if (folder / TENSORS).is_file():
            whole = safetensors.torch.load_file(folder / TENSORS)
            return put_together(document, {name: shards.part(whole[name], wanted.get(name)) for name in whole})
        return put_together(document, shards.read(folder, wanted))


def read_plain(folder: Path) -> Any:
    """The tree in a folder with None for tensors."""
    with _store_errors(folder):
        return put_together(_document_in(folder), None)


def count_tensors(folder: Path) -> int:
    """How many tensors the tree in a folder has."""
    with _store_errors(folder):
        return _count(_document_in(folder))


def _count(document: Any) -> int:
    if isinstance(document, dict):
        return 1 if "tensor" in document else sum(map(_count, document.values()))
    return sum(map(_count, document)) if isinstance(document, list) else 0


@contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise StoreError(f"{folder} holds no tree of a fit's ({str(error).strip()})") from error


def _document_in(folder: Path) -> Any:
    path = folder / TREE
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{TREE} has {path.stat().st_size} bytes, more than {LONGEST}")
    return json.loads(path.read_bytes())


def taken_apart(tree: Any) -> tuple[Any, Tensors]:
    """(what JSON can hold, tensors by their path in the tree)."""
    tensors: Tensors = {}
    return _document(tree, "", tensors), tensors


def _document(tree: Any, path: str, tensors: Tensors) -> Any:
    if isinstance(tree, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors of a tree have the path {path}")
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, dict):
        return {"dict": [[key, _document(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [_document(value, f"{path}/{place}", tensors) for place, value in enumerate(tree)]
        return {type(tree).__name__: items}
    return tree


def put_together(document: Any, tensors: Tensors | None) -> Any:
    """The tree again, with None for tensors where there are none. KeyError for one that isn't there."""
    if not isinstance(document, dict):
        return document
    ((kind, content),) = document.items()
    if kind == "tensor":
        return None if tensors is None else tensors[content]
    if kind == "dict":
        return {key: put_together(value, tensors) for key, value in content}
    items = [put_together(value, tensors) for value in content]
    return tuple(items) if kind == "tuple" else items
