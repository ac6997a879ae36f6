"""The graph as a chain of segments, so that a change is re-run only from where it is.

The sorted graph is cut between sites where as few values as possible are alive, in a residual network at the
ends of the blocks. What crosses a cut is a *boundary*: arrays by name, all that the rest of the graph needs
(also masks and rotary tables, computed once at the start, and outputs already made). A boundary is data; keep
it, and the suffix can be run again and again with other weights, by the same sessions.

    >>> segments = Segments(model.ir)                                            # doctest: +SKIP
    >>> boundary = segments.start(feeds)                                         # doctest: +SKIP
    >>> for segment in segments:                                                 # doctest: +SKIP
    ...     for site in segment.sites:
    ...         changed = segment.run(boundary, replace={site.weight.name: new_weight})
    ...         outputs = segments.run(changed, start=segment.index + 1)
    ...     boundary = segment.run(boundary)

Rounding block by block with quantized predecessors is the same loop with the change kept:

    >>> seen = segment.read(boundary, [site.activation.name])                    # doctest: +SKIP
    >>> boundary = segment.run(boundary, replace=all_rounded_weights)            # doctest: +SKIP
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.cuts import Chain, divide
from qcompiler.measure.memory import give_back
from qcompiler.measure.runner import Runner

Array = npt.NDArray[Any]
Boundary = dict[str, Array]


class Segments(Sequence["Segment"]):
    """A model cut into a chain. The graph must not be edited while this is in use.

    Args:
        model: with sorted nodes, as `capture.onnx.normalize` leaves it.
        sites: where cuts are wanted: between these. All sites of the model if None.
        max_live: how many float values may cross a cut; 1 cuts only where the graph narrows to one value.
        most_sites: a segment with more sites is cut again where up to 4 values cross, if it can be.
        threads: of ONNX Runtime.
        like: cut as this chain is, of whose graph `model` is a copy that may have further nodes between the same values
            (rounding of activations): boundaries fit both, and the sites are those of `like`.
    """

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[Site] | None = None,
        *,
        max_live: int = 1,
        most_sites: int = 12,
        threads: int | None = None,
        like: Segments | None = None,
    ) -> None:
        if like is not None:
            sites = like.sites
        self.sites: tuple[Site, ...] = tuple(find_sites(model) if sites is None else sites)
        chain = divide(model.graph, self.sites, max_live, most_sites) if like is None else like._chain
        self._model, self._threads, self._chain = model, threads, chain
        self._preamble: Runner | None = None
        self._sessions = _Sessions(model, threads, 2)
        self._segments = [Segment(model, chain, index, threads) for index in range(len(chain.parts))]
        self._weights_from = [*accumulate((s.weights for s in reversed(self._segments)), frozenset[str].union)][::-1]

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, index: Any) -> Any:
        """The segment at a position, or a list of them for a slice."""
        return self._segments[index]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def index_of(self, site: Site | str) -> int:
        """The position of the (first) segment that uses a site's weight."""
        name = site if isinstance(site, str) else site.name
        return next(s.index for s in self._segments if any(own.name == name for own in s.sites))

    def start(self, feeds: Mapping[str, Array]) -> Boundary:
        """The boundary before the first segment: what depends on the inputs and on no site."""
        if self._preamble is None:
            self._preamble = Runner(self._model, outputs=self._chain.start, threads=self._threads)
        return self._preamble(feeds)

    def run(
        self, boundary: Mapping[str, Array], start: int = 0, replace: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The model's outputs, from the boundary before segment `start`.

        Args:
            boundary: from `Segments.start` or `Segment.run`.
            start: position of the first segment to run; `len(segments)` runs none.
            replace: initializer name -> array of the same shape, used instead in all segments that run.

        One session serves all that follows: segment by segment, convolutions convert layouts at each cut.
        """
        wanted = self._chain.outputs
        done = {name: boundary[name] for name in wanted if name in boundary}
        rest = tuple(name for name in wanted if name not in done)
        if rest:
            changes = {name: array for name, array in (replace or {}).items() if name in self._weights_from[start]}
            before = self._chain.parts[start].before
            runner = self._sessions.get(before, rest, changes.keys(), boundary)
            done |= runner({**boundary, **changes})
        return {name: done[name] for name in wanted}

    def boundaries(self, feeds: Mapping[str, Array]) -> Iterator[tuple[Segment, Boundary]]:
        """Every segment with the boundary before it; only one boundary is alive at a time."""
        boundary = self.start(feeds)
        for segment in self._segments:
            yield segment, boundary
            boundary = segment.run(boundary)

    def drop(self) -> None:
        """Let go of all sessions; they are made again when needed."""
        self._preamble = None
        self._sessions.clear()
        for segment in self._segments:
            segment.drop()


class Segment:
    """One link of the chain.

    Attributes:
        index: its position.
        sites: the sites whose weight is first used here, in order.
        weights: names of all initializers that matter here; only these can be replaced.
        made: names of all values that are computed here.
    """

    def __init__(self, model: ir.Model, chain: Chain, index: int, threads: int | None) -> None:
        self._part = chain.parts[index]
        self.index = index
        self.sites: tuple[Site, ...] = self._part.sites
        self.weights: frozenset[str] = self._part.weights
        self.made: frozenset[str] = self._part.made
        self._after: tuple[str, ...] = chain.parts[index + 1].before if index + 1 < len(chain.parts) else chain.outputs
        self._sessions = _Sessions(model, threads, 3)
        self._initializers = model.graph.initializers

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values of a boundary that this segment itself reads."""
        return self._part.inputs

    @property
    def after(self) -> tuple[str, ...]:
        """The values of the next boundary."""
        return self._after

    def run(
        self,
        boundary: Mapping[str, Array],
        replace: Mapping[str, Array] | None = None,
        extra_outputs: Sequence[str] = (),
    ) -> Boundary:
        """The next boundary.

        Args:
            boundary: of this segment; more entries than needed do no harm.
            replace: initializer name -> array of the same shape; names that do not matter here are ignored. An
                operation may round otherwise (and convolutions are slower) where its weight is fed than where it is
                constant: a result depends on which names are given, and on nothing that was run before.
            extra_outputs: values made in this segment (or of the boundary) to return as well.
        """
        made = self.read(boundary, (*self._part.outputs, *extra_outputs), replace)
        return {name: made[name] if name in made else boundary[name] for name in self._after} | {
            name: made[name] for name in extra_outputs
        }

    def read(
        self, boundary: Mapping[str, Array], names: Sequence[str], replace: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Values made in this segment (or of the boundary); only what they depend on is run."""
        found = {name: boundary[name] for name in names if name in boundary}
        wanted = tuple(dict.fromkeys(name for name in names if name not in boundary))
        if not wanted:
            return found
        changes = {name: array for name, array in (replace or {}).items() if name in self.weights}
        runner = self._sessions.get(self._part.inputs, wanted, changes.keys(), boundary)
        return found | runner({**boundary, **changes})

    def drop(self) -> None:
        """Let go of the sessions and of the memory behind them."""
        self._sessions.clear()
        give_back(value for name, value in self._initializers.items() if name in self.weights)


class _Sessions:
    """The sessions used last, by inputs, outputs and the weights that a call may replace."""

    def __init__(self, model: ir.Model, threads: int | None, keep: int) -> None:
        self._model, self._threads, self._keep = model, threads, keep
        self._runners: OrderedDict[tuple[tuple[str, ...], tuple[str, ...], frozenset[str]], Runner] = OrderedDict()

    def get(
        self,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        changed: Collection[str],
        feeds: Mapping[str, Array],
    ) -> Runner:
        """The session that is fed the weights in `changed`, and no other: what was run before changes no result."""
        key = inputs, outputs, frozenset(changed)
        if key in self._runners:
            self._runners.move_to_end(key)
            return self._runners[key]
        dtypes: dict[str, np.dtype[Any]] = {name: np.asarray(feeds[name]).dtype for name in inputs}
        runner = Runner(
            self._model,
            inputs=inputs,
            outputs=outputs,
            replaceable=changed,
            threads=self._threads,
            dtypes=dtypes,
        )
        self._runners[key] = runner
        if len(self._runners) > self._keep:
            self._runners.popitem(last=False)
        return runner

    def clear(self) -> None:
        """Forget all."""
        self._runners.clear()
