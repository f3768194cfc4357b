"""Trees of plain values and tensors as files: exact JSON beside safetensors, or beside torch's own shards. No pickle.

A tree is made of dicts, lists, tuples, tensors, strings, numbers, booleans and None. JSON keeps floats to the last bit
(Python writes the shortest text that reads back the same, and NaN and Infinity by name), but neither a dict's integer
keys nor tuples, so those are spelled out.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
from torch import Tensor
from torch import distributed as dist

Tensors = dict[str, Tensor]

TREE, TENSORS = "tree.json", "tensors.safetensors"


def write_tree(tree: Any, folder: Path, *, rank: int = 0) -> None:
    """The tree as files in an empty folder, which exists. A sharded one is every rank's work, a whole one rank 0's.

    Ranks may write to one folder or each to its own: file names differ, and rank 0 writes those that all need.
    """
    document, tensors = taken_apart(tree)
    if _is_sharded(tensors):
        with _sharding() as dcp:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    elif rank == 0:
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(copies, folder / TENSORS)
    if rank == 0:
        (folder / TREE).write_text(json.dumps(document))


def read_tree(folder: Path, *, like: Any = None) -> Any:
    """The tree in a folder. Where `like`, a tree with the same keys, holds shards, so does it, whoever wrote it.

    A tree that was written sharded needs `like`, on every rank of the group. Tensors of other trees are on the CPU.
    """
    document = json.loads((folder / TREE).read_text())
    _, wanted = taken_apart(like)
    if (folder / TENSORS).is_file():
        whole = safetensors.torch.load_file(folder / TENSORS)
        return put_together(document, {name: _as(tensor, wanted.get(name)) for name, tensor in whole.items()})
    with _sharding() as dcp:
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=not _is_sharded(wanted))
    return put_together(document, wanted)


def read_plain(folder: Path) -> Any:
    """The tree in a folder with None for tensors."""
    return put_together(json.loads((folder / TREE).read_text()), {})


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


def put_together(document: Any, tensors: Tensors) -> Any:
    """The tree again."""
    if not isinstance(document, dict):
        return document
    ((kind, content),) = document.items()
    if kind == "tensor":
        return tensors.get(content)
    if kind == "dict":
        return {key: put_together(value, tensors) for key, value in content}
    items = [put_together(value, tensors) for value in content]
    return tuple(items) if kind == "tuple" else items


def _is_sharded(tensors: Tensors) -> bool:
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _as(whole: Tensor, wanted: Tensor | None) -> Tensor:
    """The rank's shard of a whole tensor where shards are wanted, else the tensor."""
    if wanted is None or not _is_sharded({"": wanted}):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(wanted, DTensor)
    # Every rank has the whole: nothing needs to be sent.
    return distribute_tensor(whole.to(wanted.device), wanted.device_mesh, wanted.placements, src_data_rank=None)


@contextmanager
def _sharding() -> Iterator[ModuleType]:
    """torch.distributed.checkpoint, which takes half a second to import, without its advice for its developers.

    What it can't do is an OSError in a line; its own is no Exception and tells the tracebacks of all ranks.
    """
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield checkpoint
        except checkpoint.CheckpointException as error:
            told = {f"rank {rank}: {problem}" for rank, (problem, _) in error.failures.items()}
            raise OSError("; ".join(sorted(told))) from error
