"""The loss of changing two weights at once, and with it CLADO's cross terms.

With d the loss of one change alone and p that of both, G[a,b] = p - d_a - d_b is how much worse (or better) two
changes are together; 1/2 x^T G x with G[a,a] = 2 d_a then predicts every choice x, and exactly so where the loss is
quadratic in the weights (CLADO, arXiv 2307.05657).

A changed boundary is carried along the chain once, and at every later site only what follows is run. Many such
boundaries travel side by side, as many as memory allows, so that each suffix's session and each quantized weight
is made once for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption
from qcompiler.graph.sites import Site
from qcompiler.measure.experiment import Experiment, Menus
from qcompiler.measure.loss import PARTS, Kind
from qcompiler.measure.probes import Probes
from qcompiler.measure.quadratic import bounds
from qcompiler.measure.quantized import QuantizedWeights
from qcompiler.measure.segments import Boundary, Segment
from qcompiler.measure.sensitivity import Sensitivity, measure_singles
from qcompiler.model import Model
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Pairs = Literal["all"] | int | Sequence[tuple[int, int]]
_Change = tuple[int, int]  # positions of the site and of its (first equal) candidate
_Pair = tuple[_Change, _Change]  # in the order of the graph
_ALIVE_BYTES = 1 << 28  # of changed boundaries, and again of quantized weights


@dataclass(frozen=True)
class PairwiseSensitivity(Sensitivity):
    """A `Sensitivity` of which some cross terms, or all, were measured.

    Attributes:
        measured: float64 [n, n], symmetric, indexed as `cross()`: p - d_a - d_b; NaN where nothing was measured.
        measured_noise: float64 [n, n]: the standard error of `measured` over disjoint parts of the data.
        unmeasured: what stands for the other cross terms: "gram", the products of sketches, or "zero".

    `probes` counts every run, also the float model's own, one a batch.
    """

    measured: Floats
    measured_noise: Floats
    unmeasured: Literal["gram", "zero"]

    def cross(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """As `Sensitivity.cross`, with measured entries as they are: neither bounded nor projected.

        An infinite loss of two changes that are finite alone counts as the bound sqrt(G_aa G_bb).
        """
        starts, gram = super().cross()
        if self.unmeasured == "zero":
            gram = np.diag(np.diag(gram))
        known, worst = ~np.isnan(self.measured), bounds(np.diag(gram))
        gram[known] = np.where(np.isfinite(self.measured), self.measured, worst)[known]
        return starts, gram


def evaluations(counts: Sequence[int]) -> int:
    """Runs of the model for all pairs on one batch: 1 + sum B_u + sum_{u<v} B_u B_v.

    Args:
        counts: B_u, the candidates of each site that are not float. B each: 1 + L B + B^2 L (L - 1) / 2.
    """
    total = sum(counts)
    return 1 + total + (total**2 - sum(b * b for b in counts)) // 2


def pairwise_sensitivities(
    model: Model,
    sites: Sequence[Site],
    candidates: Menus,
    *,
    pairs: Pairs = "all",
    unmeasured: Literal["gram", "zero"] = "gram",
    single: Sensitivity | None = None,
    samples: int | None = None,
    kinds: Mapping[str, Kind] | None = None,
    monotone: bool = True,
    progress: Progress | None = None,
) -> PairwiseSensitivity:
    """Measure single changes and pairs of them.

    Args:
        model: float, with calibration data; where it has a cache every probe is kept, so a killed run goes on and
            nothing is measured twice, whatever pairs are asked for later.
        sites: of `model`.
        candidates: as in `sensitivity.sensitivities`.
        pairs: "all"; a number k: sites at most k segments of the chain apart; or entries (a, b) of G, numbered as
            `Sensitivity.cross` does it.
        unmeasured: what `cross()` gives for other pairs.
        single: `sensitivities` of the same sites and candidates, where they are there already. Its losses form the
            diagonal; what two changes add is told from probes of the very same samples either way.
        samples: give what `single` was measured on (it may hold "enough": None).
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        monotone: of the diagonal, see `sensitivities`.
        progress: shows how far and how long.

    Raises:
        BadOption: `single` is of other sites or candidates, or `pairs` names no entry of G.
    """
    begin = time.monotonic()
    experiment = Experiment(model, sites, candidates, samples, kinds)
    if single is None:
        single = measure_singles(experiment, effort="full", monotone=monotone, progress=progress)
    elif (single.sites, single.candidates) != (tuple(s.name for s in experiment.sites), experiment.specs):
        raise BadOption("single losses of other sites or candidates", "pairwise", "measure both with the same ones")
    entries = _Entries(experiment)
    wanted = entries.wanted(pairs)
    found: dict[_Pair, list[Floats]] = {pair: [] for pair in wanted}
    for number in range(len(experiment.batches)):
        for pair, excess in _Batch(experiment, number).measure(wanted, progress or Silent()):
            found[pair].append(excess)
    measured, noise = entries.tables(found)
    runs = experiment.store.probes + len(experiment.batches)
    own = {name: getattr(single, name) for name in _SHARED}
    return PairwiseSensitivity(
        **own, probes=runs, seconds=time.monotonic() - begin,
        measured=measured, measured_noise=noise, unmeasured=unmeasured,
    )  # fmt: skip


_SHARED = ("sites", "candidates", "loss", "noise", "sketches", "mode", "kinds", "samples")


class _Entries:
    """Which changes, and pairs of changes, the entries of G stand for."""

    def __init__(self, experiment: Experiment) -> None:
        self._specs, self._segments = experiment.specs, experiment.segments
        self._rank = {site: rank for rank, site in enumerate(experiment.order)}
        self._changes = [(u, row.index(spec)) for u, row in enumerate(self._specs) for spec in row]

    def wanted(self, pairs: Pairs) -> list[_Pair]:
        """The pairs to measure: each once; what is float loses nothing with anything."""
        numbers = range(len(self._changes))
        if pairs == "all":
            chosen = list(combinations(numbers, 2))
        elif isinstance(pairs, int):
            chosen = [(a, b) for a, b in combinations(numbers, 2) if self._distance(a, b) <= pairs]
        else:
            chosen = list(pairs)
            if any(a not in numbers or b not in numbers for a, b in chosen):
                raise BadOption(f"a pair beyond the {len(numbers)} entries of G", "pairwise", "number them as cross()")
        return list(dict.fromkeys(pair for a, b in chosen if (pair := self._pair(a, b)) is not None))

    def tables(self, found: Mapping[_Pair, Sequence[Floats]]) -> tuple[Floats, Floats]:
        """Means and their standard errors [n, n], NaN where nothing was found."""
        size = len(self._changes)
        mean, noise = np.full((size, size), np.nan), np.full((size, size), np.nan)
        places: dict[_Change, list[int]] = {}
        for number, change in enumerate(self._changes):
            places.setdefault(change, []).append(number)
        for (first, second), batches in found.items():
            parts = np.concatenate(batches)
            with np.errstate(invalid="ignore"):  # of infinite losses
                values = parts.mean(), parts.std(ddof=1) / np.sqrt(len(parts))
            for a, b in product(places[first], places[second]):
                mean[a, b] = mean[b, a] = values[0]
                noise[a, b] = noise[b, a] = values[1]
        return mean, noise

    def _distance(self, a: int, b: int) -> int:
        return abs(self._segments[self._changes[a][0]] - self._segments[self._changes[b][0]])

    def _pair(self, a: int, b: int) -> _Pair | None:
        first, second = sorted((self._changes[a], self._changes[b]), key=lambda c: (self._rank[c[0]], c[1]))
        floating = any(self._specs[site][option] is None for site, option in (first, second))
        return None if first[0] == second[0] or floating else (first, second)


@dataclass
class _Front:
    """A change on its way along the chain: what it puts into the graph, and the boundary that it has reached."""

    change: _Change
    replaced: dict[str, Array]
    boundary: Boundary


class _Batch:
    """Pairs on one batch of data."""

    def __init__(self, experiment: Experiment, number: int) -> None:
        self._experiment, self._number = experiment, number
        options = [[spec for spec in row if spec is not None] for row in experiment.specs]
        self._options = options
        self._weights = QuantizedWeights(experiment.sites, options, _ALIVE_BYTES)

    def measure(self, pairs: Sequence[_Pair], progress: Progress) -> Iterator[tuple[_Pair, Floats]]:
        """For every pair p - d - d on parts of the batch, float64 [8]; what is stored comes first."""
        changes = sorted({change for pair in pairs for change in pair}, key=self._in_graph)
        if not changes:
            return
        experiment, probes = self._experiment, self._experiment.probes(self._number)
        alone: dict[_Change, Floats] = {}
        for site, option in changes:
            spec = experiment.specs[site][option]
            assert spec is not None
            alone[site, option] = experiment.store.probe(probes, experiment.sites[site], spec)[0]
        missing: list[_Pair] = []
        for pair in pairs:
            stored = experiment.store.find(*self._key(pair))
            if stored is None:
                missing.append(pair)
            else:
                yield pair, _excess(stored["losses"], *(alone[c] for c in pair))
        walk = self._walks(probes, missing)
        for _, (pair, losses) in zip(progress.track(missing, "pairs"), walk, strict=True):
            yield pair, _excess(losses, *(alone[c] for c in pair))

    def _walks(self, probes: Probes, pairs: Sequence[_Pair]) -> Iterator[tuple[_Pair, Floats]]:
        """The losses of pairs, in blocks of first changes that travel together."""
        partners: dict[_Change, list[_Change]] = {}
        for first, second in sorted(pairs, key=lambda p: (self._in_graph(p[0]), self._in_graph(p[1]))):
            partners.setdefault(first, []).append(second)
        firsts = list(partners)
        sizes = self._sizes() if firsts else []
        while firsts:
            largest = max(sizes[self._segment(firsts[0]) + 1 :], default=0)
            count = max(1, _ALIVE_BYTES // max(largest, 1))
            yield from self._walk(probes, {first: partners[first] for first in firsts[:count]})
            firsts = firsts[count:]

    def _walk(self, probes: Probes, partners: Mapping[_Change, Sequence[_Change]]) -> Iterator[tuple[_Pair, Floats]]:
        fronts: list[_Front] = []
        last = {first: max(map(self._segment, seconds)) for first, seconds in partners.items()}
        for index in range(min(map(self._segment, partners)), max(last.values()) + 1):
            segment: Segment = self._experiment.chain[index]
            starting = [first for first in partners if self._segment(first) == index]
            for first in starting:
                fronts.append(_Front(first, self._replaced(first), probes.before(index)[1]))
            waiting: dict[_Change, list[_Front]] = {}
            for front in fronts:
                for second in partners[front.change]:
                    if self._segment(second) == index:
                        waiting.setdefault(second, []).append(front)
            for second, others in waiting.items():
                for front in others:
                    both = front.replaced | self._replaced(second)
                    losses = probes.judge(segment, front.boundary, both)[0]
                    yield (front.change, second), self._keep((front.change, second), losses)
            fronts = [front for front in fronts if last[front.change] > index]
            for front in fronts:
                front.boundary = segment.run(front.boundary, front.replaced)

    def _keep(self, pair: _Pair, losses: Floats) -> Floats:
        self._experiment.store.probes += 1
        self._experiment.store.keep({"losses": losses}, *self._key(pair))
        return losses

    def _key(self, pair: _Pair) -> tuple[object, ...]:
        experiment = self._experiment
        names = [f"{experiment.sites[site].name} {experiment.specs[site][option]}" for site, option in pair]
        return ("pair", self._number, *sorted(names))

    def _sizes(self) -> list[int]:
        """Bytes of every boundary of the chain."""
        feeds = self._experiment.batches[self._number]
        return [sum(a.nbytes for a in boundary.values()) for _, boundary in self._experiment.chain.boundaries(feeds)]

    def _replaced(self, change: _Change) -> dict[str, Array]:
        site, option = change
        spec = self._experiment.specs[site][option]
        assert spec is not None
        name = self._experiment.sites[site].weight.name
        assert name is not None
        return {name: self._weights.get(site, self._options[site].index(spec))}

    def _segment(self, change: _Change) -> int:
        return self._experiment.segments[change[0]]

    def _in_graph(self, change: _Change) -> tuple[int, int, int]:
        return self._segment(change), *change


def _excess(both: Floats, first: Floats, second: Floats) -> Floats:
    """What two changes lose together beyond what they lose alone; unknown where one alone is infinite."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return np.zeros(PARTS)
    return both - first - second
