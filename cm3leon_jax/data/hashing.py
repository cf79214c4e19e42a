"""Random numbers and permutations as pure functions of counters, vectorised.

Data randomness must not depend on workers, processes or restarts, so nothing here has
a state: the same counters always give the same number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 4


def hash64(*counters: Any) -> Any:
    """uint64 of integers (arrays broadcast): a chain of splitmix64 finalisers."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for counter in counters:
            state = _mix(state + _GOLDEN + np.asarray(counter).astype(np.uint64))
    return state


def uniform(*counters: Any) -> Any:
    """float64 in [0, 1) of integers (arrays broadcast)."""
    return (hash64(*counters) >> np.uint64(11)) * 2.0**-53


def permute(positions: Any, size: int, *counters: Any) -> np.ndarray:
    """Where a permutation of `range(size)` sends `positions`; int64, same shape.

    A Feistel network on the next even number of bits; what falls outside the range is
    sent round again, which keeps it a bijection. No table is ever built.
    """
    half = max(1, -(-int(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    keys = [hash64(*counters, number) for number in range(_ROUNDS)]
    values = np.array(positions, np.uint64).reshape(-1)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for key in keys:
            with np.errstate(over="ignore"):
                left, right = right, left ^ (_mix(right + key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(np.shape(positions))


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
