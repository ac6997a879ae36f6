"""What a scale of a fold costs in the outputs of the layers behind it, with static activations and rounded weights.

Both errors are counted where they meet: a layer's output. An activation's error comes there through the columns of the
weight; the weight's own, 1/12 of its squared step, is multiplied by the power of the scaled input. So scales that help
one and harm the other (columns further apart under one step a row) are weighed against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import Site
from qcompiler.passes.transform.channel_noise import ChannelNoise
from qcompiler.passes.transform.inputs import Floats

_STEPS = 127  # of a row of 8 bits, on either side of zero


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer behind the fold: the value it reads, and its weight by input channel."""

    value: ir.Value
    peak: Floats  # [groups, rows / groups, channels / groups]: largest |weight| over the kernel
    taps: int

    def error(self, s: Floats, power: Floats) -> float:
        """Squared error of its output by rounding of its weight, the columns multiplied by `s` [channels]."""
        groups, _, own = self.peak.shape
        peak = (self.peak * s.reshape(groups, 1, own)).max(2)
        inputs = (power / s**2).reshape(groups, own).sum(1) * self.taps
        return float((peak**2).sum(1) @ inputs) / (12 * _STEPS**2)


class FoldError:
    """The predicted error of one fold.

    Args:
        fold: of kind "scale".
        noise: of the values in it that get a grid.
        sites: of the graph.
    """

    def __init__(self, fold: Fold, noise: Mapping[ir.Value, ChannelNoise], sites: Sequence[Site]) -> None:
        self._fold, self._noise = fold, noise
        self._readers: list[_Reader] = []
        cost: dict[int, float] = {}
        for site, value in ((s, v) for s in sites for v in s.activations if v in noise):
            weight = np.abs(site.matrix().astype(np.float64))
            channels = fold.region.marks[value].labels.size // site.groups
            weight = weight.reshape(site.groups, len(weight) // site.groups, channels, -1)
            self._readers.append(_Reader(value, weight.max(3), weight.shape[3]))
            for root, power in zip(self._roots(value), (weight**2).sum((1, 3)).reshape(-1), strict=True):
                cost[root] = cost.get(root, 0.0) + float(power)
        self._costs = {v: np.array([cost.get(root, 0.0) for root in self._roots(v)]) for v in noise}

    def __call__(self, half: int, s: npt.ArrayLike) -> float:
        """Squared error on one half of the data if the fold is scaled by `s` [channels of the fold]."""
        classes = self._fold.region.classes
        of = dict(zip(classes.roots(self._fold.start).reshape(-1).tolist(), np.asarray(s).tolist(), strict=True))
        signs = {v: self._fold.region.marks[v].sign for v in self._noise}
        scales = {v: np.array([of.get(root, 1.0) for root in self._roots(v)]) ** signs[v] for v in self._noise}
        grids = sum(n.error(half, scales[v], self._costs[v]) for v, n in self._noise.items())
        return grids + sum(r.error(scales[r.value], self._noise[r.value].power(half)) for r in self._readers)

    def reach(self, half: int) -> dict[ir.Value, Floats]:
        """[channels] a value: the largest |x| in one half of the data."""
        return {value: noise.reach[half] for value, noise in self._noise.items()}

    def _roots(self, value: ir.Value) -> list[int]:
        return self._fold.region.classes.roots(self._fold.region.marks[value].labels).reshape(-1).tolist()
