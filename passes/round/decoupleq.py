"""decoupleQ: codes and scales by turns, each the best for the other.

Guo et al., "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via Decoupling Parameters into Integer and
Floating Points", 2024. The walk, the Hessians and the rounding of columns are those of `GPTQ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption
from qcompiler.formats import Int, QTensor, UInt
from qcompiler.formats.base import Codes, Floats
from qcompiler.formats.fit import encode
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.gptq_core import Factor, gptq_round, hessian_loss
from qcompiler.passes.round.products import decoded
from qcompiler.passes.round.refine import refine, refine_codes, refine_scales
from qcompiler.passes.round.scale_solve import solve_scales

_SWEEPS = 2  # of descent, over the codes of the relaxed problem and over those found
_LEAST = 1e-4  # of the loss: what another round must gain


@dataclass(frozen=True)
class DecoupleQ(GPTQ):
    """GPTQ, then by turns the best codes for given scales and the best scales for given codes.

    Codes: the weights are moved to where they are best within the range of the grid, rounded from there as in GPTQ,
    and improved one by one. Scales (and zero points, which are integers here): all of a row at once, in closed form.
    No half-step raises the loss of a row.

    Attributes:
        rounds: of both half-steps, at most.
        sweeps: of `refine` that follow.
    """

    rounds: int = 4
    sweeps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise BadOption(f"{self.rounds} rounds change nothing", "decoupleq", "give 1 or more, or use 'gptq'")

    def improve(self, target: Floats, factor: Factor, start: Sequence[QTensor]) -> list[QTensor]:
        """Alternate from the codes of GPTQ; see `alternate`."""
        found = alternate(target, factor, start, self.rounds)
        return refine(target, factor.hessian, found, self.sweeps)


def alternate(matrix: Floats, factor: Factor, start: Sequence[QTensor], rounds: int) -> list[QTensor]:
    """Codes and scales by turns until a round gains nothing; shapes as in `refine`."""
    found = list(start)
    loss = _loss(matrix, factor, found).sum()
    for _ in range(rounds):
        found = better_codes(matrix, factor, found)
        found = refine(matrix, factor.hessian, found, 1, [best_scales])
        before, loss = loss, _loss(matrix, factor, found).sum()
        if loss > (1 - _LEAST) * before:
            break
    return found


def better_codes(matrix: Floats, factor: Factor, start: Sequence[QTensor]) -> list[QTensor]:
    """For every row the better of its codes, improved one by one, and of those rounded anew."""
    goal = _within_range(matrix, factor, start)
    codes = [
        refine(matrix, factor.hessian, panels, _SWEEPS, [refine_codes])
        for panels in (start, gptq_round(goal, factor, start))
    ]
    losses = [_loss(matrix, factor, panels) for panels in codes]
    better = (losses[1] < losses[0])[:, None]
    return [replace(a, codes=np.where(better, b.codes, a.codes)) for a, b in zip(*codes, strict=True)]


def best_scales(start: QTensor, hessian: Floats, pull: Floats) -> QTensor:
    """Of all groups of a row together; where rows share scales, of one group after the other."""
    own = len(start.scale) == len(start.codes) and start.spec.format.free_scales
    return (solve_scales if own else refine_scales)(start, hessian, pull)


def _within_range(matrix: Floats, factor: Factor, grids: Sequence[QTensor]) -> Floats:
    """The matrix of least loss among those that no grid clips: what GPTQ had to clip, other columns make up for."""
    if not all(isinstance(grid.spec.format, Int | UInt) for grid in grids):
        return matrix
    parts = np.split(matrix, np.cumsum([grid.shape[1] for grid in grids])[:-1], 1)
    relaxed = [_relaxed(part, grid) for part, grid in zip(parts, grids, strict=True)]
    found = refine(matrix, factor.hessian, relaxed, _SWEEPS, [refine_codes])
    return decoded(found)


def _relaxed(part: Floats, grid: QTensor) -> QTensor:
    fmt = grid.spec.format
    assert isinstance(fmt, Int | UInt)
    zero = None if grid.zero is None else grid.zero + np.float32(_Relaxed(fmt.bits).lo - fmt.lo)
    return encode(part, replace(grid.spec, format=_Relaxed(fmt.bits)), grid.scale, zero)


@dataclass(frozen=True)
class _Relaxed(Int):
    """The range of an integer format with all numbers in it."""

    def encode(self, w: Floats, scale: Floats, zero: Floats | None) -> Codes:
        """Codes clipped, not rounded."""
        return np.clip(w / scale + np.float32(0 if zero is None else zero), self.lo, self.hi).astype(np.float32)


def _loss(matrix: Floats, factor: Factor, panels: Sequence[QTensor]) -> npt.NDArray[np.float64]:
    return hessian_loss(decoded(panels) - matrix, factor.hessian)
