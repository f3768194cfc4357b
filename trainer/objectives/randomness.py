"""Fresh random numbers of an objective: a pure function of (seed, purpose, position in the run), on the batch's device.

So they are the same whatever the ranks, the micro-batches and the resumes. Philox4x32-10: Salmon et al. 2011, with
the position and the number of the block as its counter.
"""

import functools
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def normal(seed: int, purpose: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """N(0, 1), float32 [B, *shape], of positions int64 [B]: Box & Muller 1958, up to 6.7 standard deviations."""
    size = math.prod(shape)
    first, second = words(seed, purpose, positions, -(-size // 4)).unflatten(1, (-1, 2)).unbind(2)
    radius = torch.sqrt(-2 * torch.log((first + 1).float() / 2**32))
    angle = second.float() * (2 * math.pi / 2**32)
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2).flatten(1)
    return both[:, :size].reshape(len(positions), *shape)


def uniform(seed: int, purpose: str, positions: Tensor) -> Tensor:
    """Uniform in (0, 1), float64 [B], of positions int64 [B]."""
    return (words(seed, purpose, positions, 1)[:, 0].double() + 0.5) / 2**32


def words(seed: int, purpose: str, positions: Tensor, blocks: int) -> Tensor:
    """Random 32-bit words as int64 [B, 4 blocks]."""
    block = torch.arange(blocks, device=positions.device)
    low, high = positions & _WORD, (positions >> 32) & _WORD
    counter = [
        row.expand(len(positions), blocks) for row in (low[:, None], high[:, None], block, torch.zeros_like(block))
    ]
    return torch.stack(philox(counter, _key(seed, purpose)), dim=2).flatten(1)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of four 32-bit words in int64 tensors. A product's wrapped 64 bits are split by shifts."""
    a, b, c, d = counter
    for turn in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        keys = [(part + turn * weyl) & _WORD for part, weyl in zip(key, _WEYL, strict=True)]
        a, b, c, d = _high(second) ^ b ^ keys[0], second & _WORD, _high(first) ^ d ^ keys[1], first & _WORD
    return [a, b, c, d]


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD


@functools.lru_cache(maxsize=64)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"limbeck objective|{seed}|{purpose}".encode()).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])
