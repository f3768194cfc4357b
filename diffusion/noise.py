"""Everything random about a sample, as a pure function of (seed, split, sample id).

Bits come from numpy's Philox4x64-10 (Salmon et al. 2011), whose raw stream numpy keeps frozen (NEP 19): the key is
(seed, split and purpose), the counter's second word is the sample id, so samples never share a block and the noise of
an id is the same whatever batch, worker or machine asks for it. numpy's normal stream is not frozen, so the normals
are ours: the quantile function by Wichura's AS 241 (PPND16, 1988), in additions, multiplications, divisions and square
roots only. IEEE 754 rounds those one way, so the same bits come out of every machine.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from limbeck.diffusion.philox import philox_words

ALGORITHM = "philox4x64-as241"
VERSION = 1

SPLITS = {"train": 0, "holdout": 1}
PURPOSES = {"noise": 0, "condition": 1, "data": 2, "objective": 3, "guidance": 4}

_FEW = 96
"""Words of a sample up to which all samples at once are faster than one after another."""

Ids = Sequence[int] | NDArray[np.int64]


def standard_normal(seed: int, split: str, ids: Ids, shape: tuple[int, ...], *, index: int = 0) -> NDArray[np.float64]:
    """eps ~ N(0, I) of each sample, [n, *shape]; that of x_T, or drawn again at another index of a grid."""
    draws = uniform(seed, split, ids, purpose="noise", size=math.prod(shape), index=index)
    return normal_quantile(draws).reshape(-1, *shape)


def labels(seed: int, split: str, ids: Ids, num_classes: int) -> NDArray[np.int64]:
    """A uniform class of each sample: [n] in [0, num_classes)."""
    return _choices(seed, split, ids, num_classes, purpose="condition")


def guidance_index(seed: int, split: str, ids: Ids, num_scales: int) -> NDArray[np.int64]:
    """Which guidance scale each sample has, uniformly: [n] in [0, num_scales)."""
    return _choices(seed, split, ids, num_scales, purpose="guidance")


def guidance_scales(seed: int, split: str, ids: Ids, scales: Sequence[float]) -> NDArray[np.float64]:
    """The guidance scale of each sample, [n]: scales[guidance_index], or the only one there is."""
    if len(scales) == 1:
        return np.full(len(ids), scales[0], dtype=np.float64)
    return np.array(scales, dtype=np.float64)[guidance_index(seed, split, ids, len(scales))]


def data_and_place(
    seed: int, split: str, ids: Ids, *, num_data: int, num_places: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which data each sample starts from, in [0, num_data), and which place of a grid, in [0, num_places): [n] each."""
    draws = uniform(seed, split, ids, purpose="data", size=2) * (num_data, num_places)
    data, place = np.floor(draws).astype(np.int64).T
    return data, place


def _choices(seed: int, split: str, ids: Ids, count: int, *, purpose: str) -> NDArray[np.int64]:
    """A number of [0, count) for each sample, uniformly: [n]."""
    draws = uniform(seed, split, ids, purpose=purpose, size=1)[:, 0]
    return np.floor(draws * count).astype(np.int64)


def uniform(seed: int, split: str, ids: Ids, *, purpose: str, size: int, index: int = 0) -> NDArray[np.float64]:
    """`size` numbers in (0, 1) of each sample, on the grid (k + 1/2)/2^52: [n, size]. Each index < 2^24 has its own."""
    if seed < 0 or seed >= 2**64:
        raise ValueError(f"seed {seed} is not in [0, 2^64); choose one that is")
    key = seed, SPLITS[split] << 32 | index << 8 | PURPOSES[purpose]
    bits = _bits(key, np.asarray(ids, dtype=np.int64), size)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _bits(key: tuple[int, int], ids: NDArray[np.int64], size: int) -> NDArray[np.uint64]:
    """Raw words of each id's own stream: [n, size]."""
    if size <= _FEW:
        return philox_words(key, ids, size)
    bits = np.empty((len(ids), size), dtype=np.uint64)
    words = np.array(key, dtype=np.uint64)
    for row, sample_id in enumerate(ids.astype(np.uint64)):
        counter = np.array([0, sample_id, 0, 0], dtype=np.uint64)
        bits[row] = np.random.Philox(key=words, counter=counter).random_raw(size)
    return bits


# Numerator and denominator of the rational approximations, highest power first.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip

_Table = tuple[tuple[float, ...], tuple[float, ...]]


def normal_quantile(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """z with P(N(0, 1) < z) = u, for u in (0, 1), to about 1e-16 relative. AS 241, routine PPND16."""
    q = u - 0.5
    z = q * _ratio(_CENTRE, 0.180625 - q * q)
    tail = np.abs(q) > 0.425
    radius = np.sqrt(-_log(np.minimum(u[tail], 1 - u[tail])))
    size = np.where(radius <= 5, _ratio(_MIDDLE, radius - 1.6), _ratio(_FAR, radius - 5))
    z[tail] = np.copysign(size, q[tail])
    return z


def _ratio(table: _Table, x: NDArray[np.float64]) -> NDArray[np.float64]:
    above, below = (_horner(coefficients, x) for coefficients in table)
    return above / below


def _horner(coefficients: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log x = 2 artanh((m - 1)/(m + 1)) + e log 2; the machine's own log differs between libraries in its last bit."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(low, 2 * mantissa, mantissa), exponent - low
    s = (mantissa - 1) / (mantissa + 1)
    series = _horner([1 / (2 * k + 1) for k in range(11, -1, -1)], s * s)
    return 2 * s * series + exponent * math.log(2)
