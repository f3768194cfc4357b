"""Is x_T what it should be, N(0, sigma_T^2 I)? Tests on sums that are kept while rows stream by, in O(d) memory.

Neyman's smooth test (1937): z = x_T/sigma_T is mapped to u = Phi(z), uniform on (0, 1), and u to the orthonormal
shifted Legendre polynomials phi_1 .. phi_4. Their sums S_k over n samples tend to independent N(0, n), so that
sum_k S_k^2/n ~ chi-square(4); k = 1 .. 4 see a wrong mean, spread, skewness and tails. The polynomials are bounded, by
sqrt(2k + 1), which plain moments are not: their sums are close to normal from about a hundred samples on.

Four families: every coordinate; neighbours along every axis (and from sample to sample), by phi_1(u_i) phi_1(u_j), of
mean 0 and variance 1; the norm |x_T|^2, by the chi-square distribution of d degrees of freedom; and the sum over all
coordinates, which sees an offset or a correlation that they share long before any one of them does.

Storage rounds x_T. What that does to E x^2 and E x^4 is summed exactly over the 2^16 values of a 16-bit dtype and taken
into account; what it does to u is below (unit roundoff)^2, which no window of fewer than 10^9 samples can see.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from limbeck.storage_schemas.record import StorageDtype, bfloat16_values

ORDERS = 4
BLOCK_VALUES = 1 << 18
"""Looked at together: a dozen float64 arrays of this size a thread, 25 MB."""

FEWEST = 64
"""Samples below which nothing is tested: the sums are not normal yet."""

AXIS_OF_SAMPLES = 0


@dataclass(frozen=True)
class Verdict:
    """The least p-value of a family, times the family's size (Bonferroni), and where it was."""

    p: float
    where: str


@dataclass
class NoiseSums:
    """Sums over the rows so far. coordinates: [4, d]; norms, sums: [4]; neighbours: axis (0: samples) -> pairs, [m]."""

    shape: tuple[int, ...]
    count: int = 0
    coordinates: Tensor | float = 0.0
    norms: Tensor | float = 0.0
    sums: Tensor | float = 0.0
    neighbours: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    def plus(self, other: "NoiseSums") -> "NoiseSums":
        """Sums over both's rows."""
        axes = self.neighbours.keys() | other.neighbours.keys()
        return NoiseSums(
            self.shape,
            self.count + other.count,
            self.coordinates + other.coordinates,
            self.norms + other.norms,
            self.sums + other.sums,
            {axis: _joined(self.neighbours.get(axis), other.neighbours.get(axis)) for axis in sorted(axes)},
        )


def noise_sums(x_T: np.ndarray, sigma_T: float, dtype: StorageDtype) -> NoiseSums:
    """The sums of rows x_T [n, *shape], as numbers (from_storage), a block of rows at a time."""
    total = NoiseSums(x_T.shape[1:])
    rows = max(2, BLOCK_VALUES // max(1, math.prod(x_T.shape[1:])))
    for first in range(0, len(x_T), rows):
        block = torch.from_numpy(x_T[first : first + rows].astype(np.float64))
        total = total.plus(_block_sums(block, *stored_moments(sigma_T, dtype)))
    return total


def _block_sums(x: Tensor, second: float, fourth: float) -> NoiseSums:
    flat = x.flatten(1)
    d = flat.shape[1]
    spread = math.sqrt(d * (fourth - second**2))
    chi_square = ((flat.square().sum(1) - d * second) / spread * math.sqrt(2 * d) + d).clamp(min=0)
    u = torch.special.ndtr(x / math.sqrt(second))
    return NoiseSums(
        tuple(x.shape[1:]),
        len(x),
        _legendre_sums(u.flatten(1)),
        _legendre_sums(torch.special.gammainc(torch.full_like(chi_square, d / 2), chi_square / 2)),
        _legendre_sums(torch.special.ndtr(flat.sum(1) / math.sqrt(d * second))),
        _neighbour_sums(math.sqrt(3) * (2 * u - 1)),
    )


def _legendre_sums(u: Tensor) -> Tensor:
    """Sum over the first axis of sqrt(2k+1) P_k(2u - 1), k = 1 .. 4: [4, ...]."""
    v = 2 * u - 1
    square = v * v
    polynomials = (
        v,
        (3 * square - 1) / 2,
        v * (5 * square - 3) / 2,
        (35 * square * square - 30 * square + 3) / 8,
    )
    return torch.stack([math.sqrt(2 * k + 1) * p.sum(0) for k, p in enumerate(polynomials, start=1)])


def _neighbour_sums(score: Tensor) -> dict[int, tuple[int, Tensor]]:
    """Sums of score_i score_j over pairs of neighbours along each axis that has any; samples are axis 0."""
    found = {}
    for axis in range(score.ndim):
        size = score.shape[axis]
        if size > 1:
            products = score.narrow(axis, 0, size - 1) * score.narrow(axis, 1, size - 1)
            found[axis] = (len(products), products.sum(0).flatten())
    return found


def _joined(a: tuple[int, Tensor] | None, b: tuple[int, Tensor] | None) -> tuple[int, Tensor]:
    pairs = [part for part in (a, b) if part is not None]
    return sum(count for count, _ in pairs), sum((sums for _, sums in pairs[1:]), pairs[0][1])


def judge_noise(sums: NoiseSums) -> dict[str, Verdict]:
    """Each family's verdict. Rows of one coordinate that came one by one have no neighbours."""
    return {
        "coordinates": _smooth_test(sums.coordinates, sums.count, sums.shape),
        **({"neighbours": _neighbour_test(sums)} if sums.neighbours else {}),
        "norms": _smooth_test(sums.norms, sums.count, ()),
        "sums": _smooth_test(sums.sums, sums.count, ()),
    }


def _smooth_test(sums: Tensor | float, count: int, shape: tuple[int, ...]) -> Verdict:
    squares = torch.as_tensor(sums).reshape(ORDERS, -1).square() / count
    p = chi_square_tail(squares.sum(0), ORDERS)
    worst = int(p.argmin())
    moment = ("mean", "spread", "skewness", "tails")[int(squares[:, worst].argmax())]
    place = f"coordinate {tuple(map(int, np.unravel_index(worst, shape)))}, " if shape else ""
    return Verdict(min(1.0, len(p) * float(p[worst])), f"{place}{moment}")


def _neighbour_test(sums: NoiseSums) -> Verdict:
    found = [(axis, torch.special.erfc(s.abs() / math.sqrt(2 * pairs))) for axis, (pairs, s) in sums.neighbours.items()]
    tests = sum(len(p) for _, p in found)
    least, axis = min((float(p.min()), axis) for axis, p in found)
    where = "from sample to sample" if axis == AXIS_OF_SAMPLES else f"along axis {axis - 1} of a sample"
    return Verdict(min(1.0, tests * least), where)


def chi_square_tail(statistic: Tensor, degrees: int) -> Tensor:
    """P(chi-square(degrees) > statistic)."""
    return torch.special.gammaincc(torch.full_like(statistic, degrees / 2), statistic / 2)


@cache
def stored_moments(sigma_T: float, dtype: StorageDtype) -> tuple[float, float]:
    """E x^2 and E x^4 of x = sigma_T eps rounded to the dtype. float32 rounds by too little to matter."""
    if dtype == "float32":
        return sigma_T**2, 3 * sigma_T**4
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16) if dtype == "float16" else bfloat16_values(bits)
    values = np.unique(values[np.abs(values) <= 40 * sigma_T].astype(np.float64))
    middles = [(a + b) / 2 for a, b in pairwise(values.tolist())]
    edges = torch.tensor([-math.inf, *middles, math.inf], dtype=torch.float64) / sigma_T
    # From each cell's nearer tail, so that far cells keep their digits.
    low, high = edges[:-1], edges[1:]
    upper = low > 0
    mass = torch.special.ndtr(torch.where(upper, -low, high)) - torch.special.ndtr(torch.where(upper, -high, low))
    x = torch.from_numpy(values)
    return float((mass * x**2).sum()), float((mass * x**4).sum())
