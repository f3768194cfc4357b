"""Philox4x64-10 of many counters at once (Salmon et al. 2011): the bits of numpy's generator, for few words of each.

numpy makes a generator for each counter, which costs far more than the few words that an objective draws of a sample.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD, _HALF, _LOW = 1 << 64, np.uint64(32), np.uint64(0xFFFFFFFF)

Words = NDArray[np.uint64]


def philox_words(key: tuple[int, int], ids: NDArray[np.int64], size: int) -> Words:
    """The first `size` raw words of numpy's Philox(key=key, counter=[0, id, 0, 0]) for each id: [n, size]."""
    blocks = -(-size // 4)
    first = np.broadcast_to(np.arange(1, blocks + 1, dtype=np.uint64), (len(ids), blocks))  # numpy counts, then draws
    second = np.broadcast_to(ids.astype(np.uint64)[:, None], first.shape)
    words = [first, second, np.zeros_like(first), np.zeros_like(first)]
    for turn in range(_ROUNDS):
        keys = [np.uint64((start + turn * step) % _WORD) for start, step in zip(key, _WEYL, strict=True)]
        words = _round(words, keys)
    return np.stack(words, axis=-1).reshape(len(ids), 4 * blocks)[:, :size]


def _round(words: list[Words], keys: list[np.uint64]) -> list[Words]:
    (high_0, low_0), (high_1, low_1) = (_product(words[2 * i], _MULTIPLIERS[i]) for i in (0, 1))
    return [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]


def _product(words: Words, multiplier: int) -> tuple[Words, Words]:
    """(upper, lower) 64 bits of the 128-bit products."""
    a_high, a_low = words >> _HALF, words & _LOW
    b_high, b_low = np.uint64(multiplier >> 32), np.uint64(multiplier & 0xFFFFFFFF)
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    other = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (other >> _HALF), words * np.uint64(multiplier)
