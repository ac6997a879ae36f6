"""Calibration data on its way through the float model and, beside it, through the model as rounded so far.

Rows of activations that the plan rounds to fewer than 8 bits, or clips, are rounded in the second stream. Those of
plain 8 bits are left as they are: what they change is a hundredth of what narrow weights change, and it takes time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.graph.rows import rounded as rounded_rows
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.gram import multiplied
from qcompiler.measure.samples import samples_for_one
from qcompiler.measure.segments import Boundary, Segment, Segments
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import quantize_rows
from qcompiler.plan import Plan, SitePlan

Array = npt.NDArray[Any]
_AHEAD_BYTES = 160 << 20


def calibration_feeds(model: Model, samples: int, tokens: int) -> list[dict[str, Array]]:
    """Batches, spread evenly over the data.

    Args:
        model: whose calibration data is meant.
        samples: at most this many batches of one sample; of more where one is a single row or a few, and there are more
            (`samples_for_one`).
        tokens: for integer inputs, no more samples than hold about this many elements (never less than one).

    Raises:
        PassRefused: the model has no calibration data.
    """
    if model.calibration is None:
        raise PassRefused("no calibration data", where=model.name, fix="give the model calibration data")
    first = next(iter(model.calibration.batches(1)))
    length = max((a.size for a in first.values() if np.issubdtype(a.dtype, np.integer)), default=0)
    together = samples_for_one(model.ir, model.calibration)
    if together > 1:
        most = min(samples * together, max(1, tokens // length)) if length else samples * together
        some = model.calibration.spread(most)
        return [dict(feed) for feed in some.batches(-(-some.count // samples))]
    size = max((a.shape[0] for a in first.values() if a.ndim), default=1) if length == 0 else 1
    wanted = min(samples, max(1, tokens // length)) if length else samples
    total = max(1, model.calibration.count // size)
    chosen = {int(i) for i in np.linspace(0, total - 1, min(wanted, total)).round()}
    return [dict(feed) for i, feed in enumerate(model.calibration.batches(1)) if i in chosen]


def narrow_rows(plan: Plan) -> dict[str, SitePlan]:
    """The entries of a plan whose dynamic activations are worth simulating."""
    return {
        name: entry
        for name, entry in plan.sites.items()
        if entry.activation == "dynamic" and (entry.activation_bits, entry.activation_clip) != (8, 1)
    }


def _read(
    chain: Sequence[Segment], boundary: Boundary, names: Sequence[str], replace: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Values that are made in successive segments, or are in the boundary before them."""
    found: dict[str, Array] = {}
    for segment in chain:
        here = [name for name in names if name not in found and (name in boundary or name in segment.made)]
        found |= segment.read(boundary, here, replace)
        if segment is not chain[-1]:
            boundary = segment.run(boundary, replace)
    return found


class Streams:
    """The two streams, segment by segment.

    Attributes:
        segments: the float model as a chain.
        replaced: initializer name -> array, the weights rounded so far that are still needed.
    """

    def __init__(self, model: Model, feeds: Sequence[dict[str, Array]]) -> None:
        self.segments = Segments(model.ir)
        self.replaced: dict[str, Array] = {}
        self._narrow = narrow_rows(model.plan)
        self._rounding = self._with_rounded_rows(model)
        self.exact: list[Boundary] = [self.segments.start(feed) for feed in feeds]
        self.rounded: list[Boundary] = list(self.exact)
        self._segment, self._ahead = -1, list[dict[str, Array]]()

    def replace(self, site: Site, tensor: Array) -> None:
        """Use another weight from now on in the rounded stream."""
        assert site.weight.name is not None
        self.replaced[site.weight.name] = tensor

    def is_read_behind(self, site: Site) -> bool:
        """Whether what comes of a weight reaches another site, or a subgraph: if not, nobody needs it rounded."""
        users = {user for other in self.segments.sites if other is not site for user in other.users}
        todo, seen = list(site.users), set[ir.Node](site.users)
        while todo:
            behind = {node for value in todo.pop().outputs for node in value.consumers()} - seen
            if behind & users or any(node.graph is not site.node.graph for node in behind):
                return True
            seen |= behind
            todo += behind
        return False

    def inputs(self, segment: Segment, site: Site) -> Iterator[tuple[ir.Node, Array, Array]]:
        """An operation that multiplies the site's weight, and what it reads in the rounded and in the exact stream.

        For every batch all that read different rows (`gram.multiplied`); rows are rounded as the plan says. What is
        read behind `segment` is what comes of the weights rounded so far.
        """
        users, rows = tuple(multiplied(site).values()), self._narrow.get(site.name)
        names = [str(user.inputs[0].name) for user in users if user.inputs[0] is not None]
        last = max(self._made_in(segment, name) for name in names)
        for i, (rounded, exact) in enumerate(zip(self.rounded, self.exact, strict=True)):
            found = _read(self._rounding[segment.index : last + 1], rounded, names, self.replaced)
            passed = self.segments[segment.index : last + 1]
            same = rounded is exact and not self.replaced and not any(map(self._rounds_rows, passed))
            known = found
            if not same and last == segment.index:
                known = {name: self._exact_input(segment, name, i) for name in names}
            elif not same:
                known = _read(passed, exact, names)
            for user, name in zip(users, names, strict=True):
                x = found[name]
                if rows is not None:
                    x = rounded_rows(x, rows.activation_bits, rows.activation_clip)
                yield user, x, x if same else known[name]
        for later in (*self.segments[segment.index + 1 : last + 1], *self._rounding[segment.index + 1 : last + 1]):
            later.drop()

    def _made_in(self, segment: Segment, name: str) -> int:
        """The segment, this one or a later one, that a value is made in; this one for what is there before."""
        return next((s.index for s in self.segments[segment.index :] if name in s.made), segment.index)

    def _with_rounded_rows(self, model: Model) -> Segments:
        """The chain that the rounded stream takes: that of the float model where all rows stay as they are."""
        if not self._narrow:
            return self.segments
        copy = model.ir.clone()
        quantize_rows(copy, Plan(self._narrow), {site.name: site for site in find_sites(copy)})
        return Segments(copy, like=self.segments)

    def _rounds_rows(self, segment: Segment) -> bool:
        return any(site.name in self._narrow for site in segment.sites)

    def _exact_input(self, segment: Segment, name: str, i: int) -> Array:
        """An input of the float model in batch `i`; those of all sites come of one run if they fit into memory."""
        if name in self.exact[i]:
            return self.exact[i][name]
        if segment.index != self._segment:
            self._segment, self._ahead = segment.index, self._look_ahead(segment)
        return self._ahead[i][name] if self._ahead else segment.read(self.exact[i], [name])[name]

    def _look_ahead(self, segment: Segment) -> list[dict[str, Array]]:
        """For each batch the next boundary and the inputs of all sites; nothing if that is too large."""
        names = sorted({str(v.name) for site in segment.sites for v in site.activations if v.name in segment.made})
        found: list[dict[str, Array]] = []
        for exact in self.exact:
            found.append(segment.run(exact, extra_outputs=names))
            if sum(a.nbytes for a in found[0].values()) * len(self.exact) > _AHEAD_BYTES:
                return []
        return found

    def advance(self, segment: Segment) -> None:
        """Go behind a segment with both streams; behind the last one there is nothing to see."""
        if segment.index + 1 == len(self.segments):
            self._drop(segment)
            return
        for i, (rounded, exact) in enumerate(zip(self.rounded, self.exact, strict=True)):
            same = rounded is exact and not segment.weights & self.replaced.keys() and not self._rounds_rows(segment)
            ahead = self._ahead[i] if self._ahead and self._segment == segment.index else segment.run(exact)
            self.exact[i] = {name: ahead[name] for name in segment.after}
            self.rounded[i] = self.exact[i] if same else self._rounding[segment.index].run(rounded, self.replaced)
        self._ahead = []
        self._drop(segment)
        later = frozenset[str]().union(*(s.weights for s in self.segments if s.index > segment.index))
        self.replaced = {name: array for name, array in self.replaced.items() if name in later}

    def _drop(self, segment: Segment) -> None:
        segment.drop()
        if self._rounding is not self.segments:
            self._rounding[segment.index].drop()
