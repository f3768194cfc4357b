"""Pseudo-random permutations of any size, without a table: a Feistel network, walked until it lands inside.

Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of range(size), with its inverse, in constant memory."""

    size: int
    key: bytes

    def __call__(self, places: Ints) -> Ints:
        return self._walk(places, forward=True)

    def inverse(self, values: Ints) -> Ints:
        return self._walk(values, forward=False)

    def _walk(self, values: Ints, *, forward: bool) -> Ints:
        walked = self._feistel(values.astype(np.uint64), forward=forward)
        while (outside := walked >= self.size).any():
            walked[outside] = self._feistel(walked[outside], forward=forward)
        return walked.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64], *, forward: bool) -> NDArray[np.uint64]:
        """One pass over [0, 4^k), the smallest such domain that holds `size`."""
        half = np.uint64(max(1, (max(self.size - 1, 1).bit_length() + 1) // 2))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in self._round_keys if forward else self._round_keys[::-1]:
            if forward:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            else:
                left, right = right ^ (_mix(left ^ key) & mask), left
        return left << half | right

    @cached_property
    def _round_keys(self) -> NDArray[np.uint64]:
        return np.frombuffer(hashlib.sha512(self.key).digest(), dtype="<u8")[:_ROUNDS]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective scramble of 64 bits: splitmix64's finaliser (Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
