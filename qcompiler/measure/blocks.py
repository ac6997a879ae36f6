"""Which blocks of a weight deserve the better of two formats: one threshold for the whole model (FGMP).

A block is a run of neighbouring columns of one row; its score is what choosing the worse format costs there,
sum F_ii (Q_low(w_i) - Q_high(w_i))^2 with F the diagonal of the Fisher information. All blocks cost the same to
promote, so a threshold over all sites is the best choice there is, and sensitive sites get more by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.formats import QuantSpec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import Site
from qcompiler.measure.curvature import Fisher

Floats = npt.NDArray[np.float64]
BLOCK = 16


@dataclass(frozen=True)
class BlockChoice:
    """The blocks that get the better format.

    Attributes:
        threshold: the least score among them; infinity if there are none.
        fraction: by site the share of its blocks.
        masks: by site bool [rows, blocks], or None if they were not wanted.
    """

    threshold: float
    fraction: Mapping[str, float]
    masks: Mapping[str, npt.NDArray[np.bool_]] | None


def block_scores(site: Site, found: Fisher, low: QuantSpec, high: QuantSpec, block: int = BLOCK) -> Floats:
    """What the worse format costs each block: float64 [rows, ceil(columns / block)].

    Args:
        site: the weight.
        found: the Fisher information of its model.
        low: the worse format.
        high: the better one.
        block: columns in a block; the last one of a row holds what is left.
    """
    matrix = site.matrix()
    change = quantize(matrix, low).decode().astype(np.float64) - quantize(matrix, high).decode()
    return np.add.reduceat(found.of(site) * np.square(change), np.arange(0, site.columns, block), axis=1)


def choose_blocks(scores: Mapping[str, Floats], low_fraction: float, *, masks: bool = False) -> BlockChoice:
    """Give the better format to the blocks with the largest scores.

    Args:
        scores: `block_scores` by site.
        low_fraction: share of all blocks, 0 ... 1, that keep the worse format, to the nearest block; of equal
            scores the earlier blocks keep it.
        masks: whether to return the masks.

    Raises:
        ValueError: the fraction is not one, or a score is NaN.
    """
    if not 0 <= low_fraction <= 1:
        raise ValueError(f"a fraction of {low_fraction} is not between 0 and 1")
    flat = np.concatenate([np.zeros(0), *(s.ravel() for s in scores.values())])
    if np.isnan(flat).any():
        raise ValueError("a block's score is NaN")
    low = round(low_fraction * flat.size)
    promoted = np.zeros(flat.size, np.bool_)
    promoted[np.argsort(flat, kind="stable")[low:]] = True
    parts = np.split(promoted, np.cumsum([s.size for s in scores.values()])[:-1]) if scores else []
    chosen = {n: part.reshape(s.shape) for part, (n, s) in zip(parts, scores.items(), strict=True)}
    threshold = float(flat[promoted].min()) if promoted.any() else float("inf")
    fraction = {name: float(mask.mean()) for name, mask in chosen.items()}
    return BlockChoice(threshold, fraction, chosen if masks else None)
