"""Choose activation ranges by what they do to the model's output.

No measure of a single value tells how far its outliers may be clipped: in one model they carry the answer, in
the next they are noise. First one percentile is chosen for all values together, then the ends of each value are
moved in turn; only what lowers the error of the output on calibration data is kept. The graph is run from the
segment of the change on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.segments import Boundary, Segment, Segments
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.histograms import Histogram
from qcompiler.passes.round.quantized_values import Target
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ends = dict[str, tuple[float, float]]
_PERCENTILES = (100.0, 99.99, 99.97, 99.95, 99.9, 99.8)
_MOVES = (0.85, 1.18)
_FEW, _LOST = 3, 1.02  # samples after which a try that is worse by so much is given up
_GAIN = 0.998  # smaller gains on the few samples are chance


class RangeSearch:
    """The search for one model.

    Args:
        model: float, with the codes of its weights if there are any already.
        targets: the values that get a grid.
        histograms: one a target.
        feeds: calibration batches of one sample; these are the judges.
    """

    def __init__(
        self,
        model: Model,
        targets: Sequence[Target],
        histograms: Sequence[Histogram],
        feeds: Sequence[dict[str, Array]],
    ) -> None:
        self._targets = {str(t.value.name): t for t in targets}
        self._histograms = dict(zip(self._targets, histograms, strict=True))
        exact = Segments(model.ir)
        self._movable = frozenset[str]()
        self._exact = [exact.run(exact.start(feed)) for feed in feeds]
        simulated = model.clone()
        simulated.plan, simulated.weights, simulated.bias_shift = Plan(), {}, {}
        simulated.ranges = self.grids(self._at(100.0))
        InsertQDQ().run(simulated, Silent())
        sites = find_sites(simulated.ir)
        for site in sites:
            if site.name in model.weights:
                _make_constant(site, model.weights[site.name].decode())
        self._segments = Segments(simulated.ir, sites)
        self._starts = [self._segments.start(feed) for feed in feeds]
        self._movable = frozenset[str]().union(*(segment.weights for segment in self._segments))

    def run(self, progress: Progress) -> dict[str, StaticRange]:
        """The grids found."""
        tried = [self._at(percent) for percent in _PERCENTILES]
        losses = [self._losses(self._starts, 0, ends) for ends in progress.track(tried, "Ranges together")]
        best = int(np.argmin([each.sum() for each in losses]))
        ends, loss = tried[best], losses[best]
        boundaries = list(self._starts)
        for segment in progress.track(list(self._segments), "Ranges one by one"):
            for name in self._decided_in(segment):
                ends, loss = self._improve(name, segment, boundaries, ends, loss)
            changes = self._changes(ends)
            boundaries = [segment.run(boundary, changes) for boundary in boundaries]
            segment.drop()
        return self.grids(ends)

    def grids(self, ends: Ends) -> dict[str, StaticRange]:
        """The grids of given ends."""
        found: dict[str, StaticRange] = {}
        for name, target in self._targets.items():
            found[name] = found[str(target.like.name)] if target.like is not None else target.grid(*ends[name])
        return found

    def _at(self, percent: float) -> Ends:
        found: Ends = {}
        for name, histogram in self._histograms.items():
            # What is quantized before the first segment (inputs) keeps all it has.
            movable = percent < 100 and f"{name}_scale" in self._movable
            found[name] = histogram.percentile(percent) if movable else (histogram.low, histogram.high)
        return found

    def _decided_in(self, segment: Segment) -> list[str]:
        """The values with a grid of their own that is first used in this segment."""
        before = frozenset[str]().union(*(s.weights for s in self._segments if s.index < segment.index))
        fresh = segment.weights - before
        return [name for name, target in self._targets.items() if target.like is None and f"{name}_scale" in fresh]

    def _improve(
        self, name: str, segment: Segment, boundaries: Sequence[Boundary], ends: Ends, loss: Floats
    ) -> tuple[Ends, Floats]:
        for factor in _MOVES:
            while True:  # go on in a direction that helps
                histogram, (low, high) = self._histograms[name], ends[name]
                moved = max(low * factor, histogram.low), min(high * factor, histogram.high)
                if moved == ends[name]:
                    break
                changed = {**ends, name: moved}
                found = self._losses(boundaries, segment.index, changed, loss)
                if found.sum() >= loss.sum() * _GAIN:
                    break
                ends, loss = changed, found
        return ends, loss

    def _changes(self, ends: Ends) -> dict[str, Array]:
        """All grids, under the names of their initializers."""
        changes: dict[str, Array] = {}
        for name, grid in self.grids(ends).items():
            changes[f"{name}_scale"] = np.array(grid.scale, np.float32)
            changes[f"{name}_zero"] = np.array(grid.zero, np.uint8)
        return changes

    def _losses(
        self, boundaries: Sequence[Mapping[str, Array]], start: int, ends: Ends, best: Floats | None = None
    ) -> Floats:
        """Squared error of the outputs relative to their power, float64 [samples].

        Infinite from the sample on where it has clearly lost against `best`, the losses of the same samples so far.
        """
        changes, losses = self._changes(ends), np.full(len(self._exact), np.inf)
        for number, (boundary, exact) in enumerate(zip(boundaries, self._exact, strict=True)):
            outputs = self._segments.run(boundary, start, changes)
            losses[number] = sum(
                _relative(outputs[name], y) for name, y in exact.items() if np.issubdtype(y.dtype, np.floating)
            )
            seen = slice(number + 1)
            if best is not None and number >= _FEW and losses[seen].sum() > _LOST * best[seen].sum():
                break
        return losses


def _make_constant(site: Site, matrix: npt.NDArray[np.float32]) -> None:
    """Set a weight in its graph; convolutions are slower with weights that are fed."""
    tensor = site.weight.const_value
    assert tensor is not None
    array = site.from_matrix(matrix).astype(tensor.dtype.numpy(), copy=False)
    site.weight.const_value = ir.tensor(array, name=site.weight.name)


def _relative(found: Array, exact: Array) -> float:
    """Squared error relative to the power, where the float model gives numbers; infinite if a number is lost there."""
    known = np.isfinite(exact)
    if not known.all():
        found, exact = found[known], exact[known]
    error = _power(found - exact) / (_power(exact) or 1.0)
    return error if np.isfinite(error) else np.inf


def _power(array: Array) -> float:
    """Sum of squares, in float64: those of large float32 numbers overflow."""
    flat = array.ravel()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))
