"""Allocation problems like measured ones: losses that fall fourfold a bit, errors of units that line up or cancel."""

from __future__ import annotations

import numpy as np

from qcompiler.solvers.problem import Problem

BITS = {4: (2, 3, 4, 8), 5: (2, 3, 4, 6, 8), 6: (2, 3, 4, 5, 6, 8)}


def coupled(units: int, options: int, coupling: float, seed: int, share: float = 0.3) -> Problem:
    """A problem whose loss matrix looks like CLADO's on a deep network.

    Args:
        units: number.
        options: number; their bits are those of `BITS`.
        coupling: cross terms relative to the geometric mean of the losses; 0.1 is weak (the matrix is positive
            semidefinite), 0.3 medium (clearly indefinite). Strongest between neighbours, with either sign.
        seed: of the random numbers.
        share: the budget, between the least (0) and the largest (1) size.
    """
    rng = np.random.default_rng(seed)
    bits = np.array(BITS[options], np.float64)
    sensitivity = np.exp(rng.normal(0, 1.0, units))[:, None]
    loss = sensitivity * 4.0 ** -(bits - 2) * np.exp(rng.normal(0, 0.1, (units, options)))
    size = rng.integers(1, 10, units)[:, None] * bits
    index = np.arange(units)
    near = np.exp(-np.abs(index[:, None] - index[None]) / 3) * rng.choice([-1.0, 1.0], (units, units))
    correlation = coupling * (near + 0.15 * rng.normal(size=(units, units)))
    correlation = np.triu(correlation, 1) + np.triu(correlation, 1).T
    scale = np.sqrt(2 * loss).ravel()
    wobble = 1 + 0.1 * rng.normal(size=(units * options, units * options))
    cross = np.kron(correlation, np.ones((options, options))) * np.outer(scale, scale) * (wobble + wobble.T) / 2
    least, most = size.min(axis=1).sum(), size.max(axis=1).sum()
    return Problem(loss, {"size": size}, {"size": float(least + share * (most - least))}, cross=cross)


def low_rank(units: int, options: int, rank: int, seed: int, share: float = 0.3) -> Problem:
    """A hard one: the cross terms of random Gauss-Newton factors, together far larger than the diagonal."""
    rng = np.random.default_rng(seed)
    bits = np.array(BITS[options], np.float64)
    sketch = rng.normal(size=(units, options, rank)) * 2.0 ** -(bits - 2)[None, :, None]
    sketch += 2 * rng.normal(size=(units, 1, rank)) * 2.0 ** -(bits - 2)[None, :, None]
    flat = sketch.reshape(units * options, rank) / np.sqrt(rank)
    cross = flat @ flat.T
    loss = 0.5 * cross.diagonal().reshape(units, options)
    for unit in range(units):
        own = slice(unit * options, (unit + 1) * options)
        cross[own, own] = 0
    size = rng.integers(1, 10, units)[:, None] * bits
    least, most = size.min(axis=1).sum(), size.max(axis=1).sum()
    return Problem(loss, {"size": size}, {"size": float(least + share * (most - least))}, cross=cross)
