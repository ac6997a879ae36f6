"""Bases by power: the strongest directions first, and within either part a rotation that shares the power out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompiler.passes.transform.hadamard import largest_block, rotation

Floats = npt.NDArray[np.float64]


def by_power(moments: Floats, high: int, seed: int) -> tuple[Floats, Floats, float]:
    """Orthonormal columns: the strong directions and the weak ones.

    Args:
        moments: float64 [width, width], second moments.
        high: how many directions are strong, more than 0 and less than all.
        seed: of the rotations of both parts.

    Returns:
        [width, high], [width, width - high], and the share of the power in the first.
    """
    power, ascending = np.linalg.eigh(moments)
    basis = ascending[:, ::-1]
    strong, weak = basis[:, :high] @ mixed(high, seed), basis[:, high:] @ mixed(len(basis) - high, seed + 1)
    return strong, weak, float(power[-high:].sum() / (power.sum() or 1.0))


def mixed(size: int, seed: int) -> Floats:
    """A rotation that shares power out among channels: a Hadamard matrix, a random one where none is known."""
    if size > 2 and largest_block(size) == size:
        return rotation(size, seed)
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return q * np.sign(np.diagonal(r))
