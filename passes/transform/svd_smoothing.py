"""The smoothing of SVDQuant: scales of a layer's input, judged by what is left beside the branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.errors import PassRefused, Refusal
from qcompiler.formats.base import Floats
from qcompiler.graph.folds import Fold
from qcompiler.model import Model
from qcompiler.passes.transform.branching import Readers
from qcompiler.passes.transform.columns import Doubles, factors_of, probe, readers_of
from qcompiler.passes.transform.factors import Metric, Rounding, approximate
from qcompiler.passes.transform.inputs import channel_reach, find_folds
from qcompiler.passes.transform.row_error import RowError, with_rows
from qcompiler.progress import Progress

_SMALLEST = 1e-5
_ROWS = 128  # of each weight, to judge scales
Exponents = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Smoothed:
    """Sites that a fold scales, with rows of their input and the rank that their branch will have."""

    group: Readers
    rows: Floats
    rank: int

    def error(self, columns: Doubles) -> float:
        """What is left beside the branch with the input divided by `columns` [columns], the weights multiplied."""
        scale = columns.astype(np.float32)
        matrix = self.group.matrix() * scale
        factors = approximate(matrix, Metric.plain(len(scale)), self.rank)
        if factors is None:
            return float("inf")
        rest = matrix - factors.product()
        chosen = [max(1, site.rows // _ROWS) for site in self.group.sites]
        parts = [part[::step] for part, step in zip(self.group.split(rest), chosen, strict=True)]
        formats = [spec for _, spec in self.group.rounding.parts]
        rounding = Rounding([(len(part), spec) for part, spec in zip(parts, formats, strict=True)])
        judge, sample = RowError.of(self.rows / scale, self.group.plans[0]), np.concatenate(parts)
        return judge(sample, rounding.fitted(sample)(sample))


def exponents(grid: int) -> list[Exponents]:
    """(0, 0), (a, 0) and (a, 1 - a) for a = 1 / grid ... (grid - 1) / grid: 39 pairs for a grid of 20."""
    steps = [k / grid for k in range(1, grid)]
    return [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]


def smooth(
    model: Model, groups: Mapping[Readers, int], grid: int, progress: Progress
) -> tuple[dict[str, Any], list[Refusal]]:
    """Fold scales into what produces the inputs of sites that get a branch.

    Args:
        model: float, with calibration data.
        groups: the sites, with the rank of their branch.
        grid: see `exponents`.
        progress: shows how far.

    Returns:
        By value the exponents, and the error relative to that without scales; and why other values have no scales.
    """
    folds, missing = find_folds(model, {group.value: -1 for group in groups}, _accept(groups))
    refused = [Refusal(where.where, f"not smoothed: {where.reason}") for where in missing]
    reach = channel_reach(model, {fold.value.name or "": fold.axis for fold in folds}, 100.0)
    chosen: dict[str, Any] = {}
    # Later values first: what reads an earlier one is then as it stays.
    for fold, found in with_rows(model, folds[::-1], lambda fold: _read(fold, groups), progress, "smoothing"):
        name = fold.value.name or ""
        readers = [Smoothed(group, rows, groups[group]) for group, rows in found]
        numbers, pair, error = best_scales(fold, readers, reach[name], grid)
        try:
            fold.scale(numbers)
        except PassRefused as reason:
            refused.append(Refusal(name, f"not smoothed: {reason}"))
        else:
            chosen[name] = {"exponents": list(pair), "error": error}
    return chosen, refused


def _read(fold: Fold, groups: Iterable[Readers]) -> list[Readers]:
    return [group for group in groups if readers_of(fold, group.sites)]


def _accept(groups: Iterable[Readers]) -> Callable[[Fold], str | None]:
    """Which folds multiply whole columns of the weights that read their value, once; else why not."""
    taken: set[Readers] = set()

    def accept(fold: Fold) -> str | None:
        read = _read(fold, groups)
        if not read:
            return "the scales would not be of columns of a weight with a branch"
        if taken.intersection(read):
            return "a weight that reads it has scales for another value"
        if any(_columns(fold, group, probe(fold)) is None for group in read):
            return "it would scale rows of the same weights"
        taken.update(read)
        return None

    return accept


def _columns(fold: Fold, group: Readers, numbers: Doubles) -> Doubles | None:
    """What `fold.scale(numbers)` multiplies the columns of all weights by, [columns]; None where rows differ."""
    found = np.concatenate([factors_of(fold, site, numbers) for site in group.sites])
    return found[0] if (found == found[:1]).all() else None


def best_scales(fold: Fold, readers: Sequence[Smoothed], reach: Doubles, grid: int) -> tuple[Doubles, Exponents, float]:
    """The scales A^a / W^b with the least error of all readers beside their branches.

    Source: Li et al., SVDQuant (2411.05007); the grid as its code has it.

    Args:
        fold: whose scales; of each reader it multiplies all rows alike.
        readers: what reads the scaled value.
        reach: A, float64 [channels], the largest |x|; W is the largest weight that a channel meets.
        grid: see `exponents`.

    Returns:
        Scales float64 [channels], their exponents, and their error relative to that of no scales.
    """
    weights = fold.absmax(fold.readers)
    best, chosen, least, plain = np.ones(fold.size), (0.0, 0.0), np.inf, np.inf
    for pair in exponents(grid):
        numbers = _scales(fold, reach, weights, pair)
        columns = [_columns(fold, one.group, numbers) for one in readers]
        error = sum(one.error(c) for one, c in zip(readers, columns, strict=True) if c is not None)
        plain = error if pair == (0.0, 0.0) else plain
        if error < least:
            best, chosen, least = numbers, pair, error
    return best, chosen, float(least / plain) if plain > 0 else 1.0


def _scales(fold: Fold, reach: Doubles, weights: Doubles, pair: Exponents) -> Doubles:
    """The product of the largest and the smallest is 1; channels without input or weight stay as they are."""
    reach = fold.tied(reach, lambda group: float(group.max()))
    alive = (reach > 0) & (weights > 0) & fold.free
    raw = np.maximum(reach, _SMALLEST) ** pair[0] / np.maximum(weights, _SMALLEST) ** pair[1]
    if alive.any():
        raw = np.maximum(raw / np.sqrt(raw[alive].max() * raw[alive].min()), _SMALLEST)
    return fold.tied(np.where(alive, raw, 1.0))
