"""Calibration data on its way through the float model and, beside it, through the model as rounded so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import PassRefused
from qcompiler.graph.sites import Site
from qcompiler.measure.segments import Boundary, Segment, Segments
from qcompiler.model import Model

Array = npt.NDArray[Any]


def calibration_feeds(model: Model, samples: int, tokens: int) -> list[dict[str, Array]]:
    """Batches of one sample, spread evenly over the data.

    Args:
        model: whose calibration data is meant.
        samples: at most this many.
        tokens: for integer inputs, no more samples than hold about this many elements (never less than one).

    Raises:
        PassRefused: the model has no calibration data.
    """
    if model.calibration is None:
        raise PassRefused("no calibration data", where=model.name, fix="give the model calibration data")
    first = next(iter(model.calibration.batches(1)))
    length = max((a.size for a in first.values() if np.issubdtype(a.dtype, np.integer)), default=0)
    size = max(a.shape[0] for a in first.values() if a.ndim) if length == 0 else 1
    wanted = min(samples, max(1, tokens // length)) if length else samples
    total = max(1, model.calibration.count // size)
    chosen = {int(i) for i in np.linspace(0, total - 1, min(wanted, total)).round()}
    return [dict(feed) for i, feed in enumerate(model.calibration.batches(1)) if i in chosen]


class Streams:
    """The two streams, segment by segment.

    Attributes:
        segments: the float model as a chain.
        replaced: initializer name -> array, the weights rounded so far that are still needed.
    """

    def __init__(self, model: Model, feeds: Sequence[dict[str, Array]]) -> None:
        self.segments = Segments(model.ir)
        self.replaced: dict[str, Array] = {}
        self.exact: list[Boundary] = [self.segments.start(feed) for feed in feeds]
        self.rounded: list[Boundary] = list(self.exact)

    def replace(self, site: Site, tensor: Array) -> None:
        """Use another weight from now on in the rounded stream."""
        assert site.weight.name is not None
        self.replaced[site.weight.name] = tensor

    def inputs(self, segment: Segment, site: Site) -> Iterator[tuple[Array, Array]]:
        """(rounded, exact) data input of a site, batch by batch."""
        assert site.activation is not None
        name = str(site.activation.name)
        for rounded, exact in zip(self.rounded, self.exact, strict=True):
            x = segment.read(rounded, [name], self.replaced)[name]
            yield x, x if rounded is exact and not self.replaced else segment.read(exact, [name])[name]

    def advance(self, segment: Segment) -> None:
        """Go behind a segment with both streams; behind the last one there is nothing to see."""
        if segment.index + 1 == len(self.segments):
            segment.drop()
            return
        for i, (rounded, exact) in enumerate(zip(self.rounded, self.exact, strict=True)):
            same = rounded is exact and not segment.weights & self.replaced.keys()
            self.exact[i] = segment.run(exact)
            self.rounded[i] = self.exact[i] if same else segment.run(rounded, self.replaced)
        segment.drop()
        later = frozenset[str]().union(*(s.weights for s in self.segments if s.index > segment.index))
        self.replaced = {name: array for name, array in self.replaced.items() if name in later}
