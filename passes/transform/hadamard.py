"""Hadamard matrices: entries of +-1, orthogonal rows; turned by one, an outlier is shared out evenly.

Orders: 1, 2, p + 1 for a prime p = 3 mod 4 and 2 (p + 1) for a prime p = 1 mod 4 (Paley), and twice any of these
(Sylvester). So 12, 20, 28, 36, 60, ... and with them most widths of transformers. For other orders there are
orthogonal matrices whose entries are nearly as even (`even`).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def rotation(width: int, seed: int = 0, block: int = 0, *, keep_mean: bool = False) -> Floats:
    """A random orthogonal matrix with entries of about equal size, diag(+-1) H, float64 [width, width].

    Args:
        width: of what it turns.
        seed: of the signs.
        block: order of Hadamard blocks on the diagonal; 0: one matrix that mixes everything.
        keep_mean: make one that maps the vector of ones to itself, see `mean_kept`.

    Raises:
        ValueError: the blocks don't divide the width, or no such Hadamard matrix is known.
    """
    size = block or width
    if width < 1 or width % size:
        raise ValueError(f"blocks of {size} don't divide {width}")
    if block and _construction(block) is None:
        raise ValueError(f"no Hadamard matrix of order {block} is known here")
    rng = np.random.default_rng(seed)
    matrix = rng.choice([-1.0, 1.0], (width, 1)) * _diagonal(even(size), width // size)
    # Without signs of columns one row would sum to sqrt(size), and the reflection would be in that row.
    return mean_kept(matrix * rng.choice([-1.0, 1.0], width)) if keep_mean else matrix


def even(width: int) -> Floats:
    """An orthogonal matrix of any order whose entries are about 1 / sqrt(width), at most sqrt(2) of that.

    A Hadamard matrix; of orders that have none, Hartley's matrix of the part that is in the way, times one.
    """
    size = largest_block(width)
    return np.kron(_hartley(width // size), hadamard(size) / np.sqrt(size))


def factors(width: int) -> tuple[int, int]:
    """Two orders whose matrices make one of this width (as a Kronecker product) with the least work.

    They are orders of Hadamard matrices as far as possible; the first is that of the outer axis.
    """
    pairs = [(a, width // a) for a in range(1, width + 1) if width % a == 0]
    return min(pairs, key=lambda pair: (sum(_construction(d) is None for d in pair), sum(pair)))


def _diagonal(block: Floats, times: int) -> Floats:
    return np.asarray(np.kron(np.eye(times), block), np.float64)


def _hartley(order: int) -> Floats:
    """Cosine plus sine: real, symmetric and orthogonal for every order."""
    angle = 2 * np.pi * np.outer(np.arange(order), np.arange(order)) / order
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(order)


def mean_kept(matrix: Floats) -> Floats:
    """The nearest thing to an orthogonal matrix that maps the vector of ones to itself: for streams with LayerNorms.

    The matrix, then the reflection that brings what it makes of ones back to ones. Entries of a Hadamard matrix with
    random signs stay about equal: they change by about 1/width where they are 1/sqrt(width).
    """
    width = len(matrix)
    away = matrix.T.sum(1) - 1  # of ones @ matrix
    length = away @ away
    return matrix if length < 1e-12 * width else matrix - np.outer(matrix @ away, away) * (2 / length)


def largest_block(width: int) -> int:
    """The largest divisor of a width that is the order of a known Hadamard matrix; 1 if the width is odd."""
    divisors = (d for d in range(width, 0, -1) if width % d == 0)
    return next(d for d in divisors if _construction(d) is not None)


def hadamard(order: int) -> Floats:
    """A Hadamard matrix, float64 [order, order] of +-1.

    Raises:
        ValueError: none is known here.
    """
    base = _construction(order)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    matrix: Floats = _paley(base)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@cache
def _construction(order: int) -> int | None:
    """The smallest order from which doubling leads to this one."""
    found = None
    while order >= 1:
        if order <= 2 or _is_paley(order):
            found = order
        if order % 2:
            break
        order //= 2
    return found


def _is_paley(order: int) -> bool:
    return order % 4 == 0 and (_is_prime(order - 1) or (order // 2 % 2 == 0 and _is_prime(order // 2 - 1, 1)))


def _is_prime(number: int, rest: int = 3) -> bool:
    """Whether a number is a prime with this rest after division by 4."""
    return number > 2 and number % 4 == rest and all(number % d for d in range(3, int(number**0.5) + 1, 2))


def _paley(order: int) -> Floats:
    if order <= 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if _is_prime(order - 1):
        core = _residues(order - 1)  # antisymmetric
        return np.eye(order) + np.block([[np.zeros((1, 1)), np.ones((1, order - 1))], [-np.ones((order - 1, 1)), core]])
    prime = order // 2 - 1
    core = np.block([[np.zeros((1, 1)), np.ones((1, prime))], [np.ones((prime, 1)), _residues(prime)]])
    return np.kron(core, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(prime + 1), [[1.0, -1.0], [-1.0, -1.0]])


def _residues(prime: int) -> Floats:
    """Jacobsthal's matrix: 1 where row - column is a square modulo the prime, else -1, 0 on the diagonal."""
    squares = np.zeros(prime) - 1
    squares[np.arange(1, prime) ** 2 % prime] = 1
    squares[0] = 0
    return squares[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
