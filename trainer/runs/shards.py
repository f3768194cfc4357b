"""Tensors that are sharded over ranks as one safetensors file a rank, which any number of ranks reads again.

A file holds the pieces of its rank under the tensors' names; its header, which is JSON, says in `pieces` of which whole
each is a part, and from where on: {name: [shape of the whole, offset in each dimension]}. Together the pieces are every
number of a tensor exactly once, or nothing is read: what several ranks hold alike, the first of them writes.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist

NAME = re.compile(r"shard-([0-9]{5,6})-of-([0-9]{5,6})\.safetensors")
Box = tuple[tuple[int, int], ...]
"""[start, stop) in each dimension of a whole tensor."""


@dataclass(frozen=True)
class Piece:
    """A part of a whole tensor: where it lies in it, and the open file that holds it under the tensor's name."""

    shape: tuple[int, ...]
    box: Box
    file: Any

    def read(self, name: str, inner: Box) -> Tensor:
        """The piece's numbers within a box of the whole that lies in its own."""
        if inner == self.box:
            tensor: Tensor = self.file.get_tensor(name)
            return tensor
        at = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, self.box, strict=True))
        some: Tensor = self.file.get_slice(name)[at]
        return some


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a share of a whole."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def write(tensors: Mapping[str, Tensor], folder: Path, *, rank: int, world_size: int) -> None:
    """Write a rank's file: its pieces of sharded tensors; of the rest, which is alike everywhere, all by rank 0."""
    mine, pieces = {}, {}
    for name, tensor in tensors.items():
        box, local, first = _held(tensor, rank)
        if first and (local.numel() or all(start == 0 for start, _ in box)):  # an empty tensor is one piece, too
            mine[name] = local.detach().to("cpu", copy=True).contiguous()
            pieces[name] = [list(tensor.shape), [start for start, _ in box]]
    name = f"shard-{rank + 1:05d}-of-{world_size:05d}.safetensors"
    safetensors.torch.save_file(mine, folder / name, metadata={"pieces": json.dumps(pieces)})


def read(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors by their names: those `wanted` filled in place, with the rank's share of a sharded one; others whole.

    ValueError where the files don't hold every wanted tensor whole and exactly once.
    """
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in _files(folder)]
        found = _pieces(files)
        for name, pieces in found.items():
            _check_whole(name, pieces)
        if missing := sorted(wanted.keys() - found.keys()):
            raise ValueError(f"its shards lack {missing[0]}")
        return {name: _filled(name, pieces, wanted.get(name)) for name, pieces in found.items()}


def part(whole: Tensor, wanted: Tensor | None) -> Tensor:
    """The rank's share of a whole tensor where a share is wanted, else the tensor."""
    if wanted is None or not is_sharded([wanted]):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(wanted, DTensor)
    # Every rank has the whole: nothing needs to be sent.
    return distribute_tensor(whole.to(wanted.device), wanted.device_mesh, wanted.placements, src_data_rank=None)


def _held(tensor: Tensor, rank: int) -> tuple[Box, Tensor, bool]:
    """(where this rank's share lies in the whole, the share, whether no rank before it holds the same)."""
    whole: Box = tuple((0, size) for size in tensor.shape)
    if not is_sharded([tensor]):
        return whole, tensor, rank == 0
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(tensor, DTensor)
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None
    box, first = list(whole), True
    for dim, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            box[placement.dim] = _chunk(*box[placement.dim], mesh.size(dim), place[dim])
        elif isinstance(placement, Replicate):
            first = first and place[dim] == 0
        else:
            raise ValueError(f"a tensor that is placed as {placement} can't be saved")
    local = tensor.to_local()
    assert local.shape == tuple(stop - start for start, stop in box)
    return tuple(box), local, first


def _chunk(start: int, stop: int, number: int, place: int) -> tuple[int, int]:
    """One of torch.chunk's parts, by which Shard divides: all as large as the first, but for the last ones."""
    size = -(-(stop - start) // number)
    return min(stop, start + place * size), min(stop, start + (place + 1) * size)


def _files(folder: Path) -> Sequence[Path]:
    """All files of one writing, in the ranks' order."""
    found = {path.name: path for path in sorted(folder.iterdir()) if NAME.fullmatch(path.name)}
    numbers = [tuple(map(int, match.groups())) for match in map(NAME.fullmatch, found) if match]
    world_size = numbers[0][1] if numbers else 0
    if not numbers or numbers != [(rank + 1, world_size) for rank in range(world_size)]:
        raise ValueError(
            f"it holds neither tensors.safetensors nor every shard of a run ({', '.join(found) or 'none'})"
        )
    return list(found.values())


def _pieces(files: Sequence[Any]) -> dict[str, list[Piece]]:
    """Every tensor's pieces, as the files' headers say."""
    found: dict[str, list[Piece]] = {}
    for file in files:
        places = json.loads((file.metadata() or {})["pieces"])
        for name in file.keys():  # noqa: SIM118 - it is no dict
            shape, offsets = (tuple(map(int, numbers)) for numbers in places[name])
            sizes = file.get_slice(name).get_shape()
            box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
            found.setdefault(name, []).append(Piece(shape, box, file))
    return found


def _check_whole(name: str, pieces: Sequence[Piece]) -> None:
    """Refuse pieces that are not each number of one whole exactly once."""
    shape, dtypes = pieces[0].shape, {piece.file.get_slice(name).get_dtype() for piece in pieces}
    inside = all(
        piece.shape == shape
        and len(piece.box) == len(shape)
        and all(0 <= start <= stop <= size for (start, stop), size in zip(piece.box, shape, strict=True))
        for piece in pieces
    )
    boxes = [piece.box for piece in pieces]
    if not inside or len(dtypes) > 1 or sum(map(_count, boxes)) != math.prod(shape) or not _apart(boxes, len(shape)):
        raise ValueError(f"its pieces of {name} are not a whole of {list(shape)}")


def _filled(name: str, pieces: Sequence[Piece], wanted: Tensor | None) -> Tensor:
    """The tensor that is wanted, or a whole one, with this rank's numbers from the pieces."""
    shape = pieces[0].shape
    target = wanted
    if target is None:
        target = torch.empty(shape, dtype=pieces[0].file.get_tensor(name).dtype)
    if target.shape != shape:
        raise ValueError(f"{name} is {list(shape)} there and {list(target.shape)} in this fit")
    with torch.no_grad():
        box, local, _ = _held(target, 0)
        for piece in pieces:
            inner = _common(box, piece.box)
            if inner is None:
                continue
            some = piece.read(name, inner)
            if some.dtype != local.dtype:
                raise ValueError(f"{name} is {some.dtype} there and {local.dtype} in this fit")
            local[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, box, strict=True))].copy_(some)
    return target


def _apart(boxes: Sequence[Box], dims: int) -> bool:
    """Whether no two have a number in common. Those of one mesh dimension lie one after another: no need for pairs."""
    for dim in range(dims):
        spans = sorted(box[dim] for box in boxes)
        if all(before[1] <= after[0] for before, after in pairwise(spans)):
            return True
    return not any(_common(one, other) is not None for one, other in combinations(boxes, 2))


def _common(one: Box, other: Box) -> Box | None:
    """The box that two have in common; None where that holds no number."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _count(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
