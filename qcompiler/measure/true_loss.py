"""The truth about an allocation: the loss of the model with all of its sites quantized at once.

Predictions (`sensitivity`) add up what single changes lose. Here the model runs with the whole allocation, on the same
samples, with the same rounding and judged the same way, so that predictions can be checked and the best ones re-ranked.

Allocations that agree on the first segments of the chain share the run of these segments: evaluating them walks a tree.
All 4096 allocations of a small net with six layers take 2.4 CPU seconds so, and 41 one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration import Calibration
from qcompiler.formats import QuantSpec
from qcompiler.graph.sites import Site
from qcompiler.measure.cache import Cache
from qcompiler.measure.experiment import Menus, weight_formats
from qcompiler.measure.loss import PARTS, Kind, Reference
from qcompiler.measure.quantized import QuantizedWeights
from qcompiler.measure.samples import choose_samples, samples_for_one
from qcompiler.measure.segments import Boundary, Segment, Segments
from qcompiler.measure.stream import calibration_of, measurement_key
from qcompiler.model import Model

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Assignment = Sequence[int] | npt.NDArray[np.intp]
_Key = tuple[int, ...]
FLOAT = -1  # in an assignment: this site keeps its float weight


class TrueLoss:
    """Losses of whole allocations.

        >>> truth = TrueLoss(model, sites, [specs] * len(sites))               # doctest: +SKIP
        >>> truth.loss([2, 0, 1, FLOAT])                                       # doctest: +SKIP
        0.0213

    An assignment is one candidate a site (its position among the site's candidates), or FLOAT.

    Args:
        model: float, with calibration data; where it has a cache every loss is kept, so a killed run goes on.
        sites: of `model`; others stay float.
        candidates: formats by site name, or in the order of `sites`; of a SitePlan the weight's format counts, None is
            float.
        samples: of the data; None or 0: those that `sensitivities` takes.
        data: other samples than the model's calibration data, such as `held_back` ones.
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        memory: bytes for quantized weights. Apart from them one boundary is alive for each segment at which the
            assignments of one call part.

    Attributes:
        used: number of samples.
        runs: how many losses were measured and not known before.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        candidates: Menus,
        *,
        samples: int | None = None,
        data: Calibration | None = None,
        kinds: Mapping[str, Kind] | None = None,
        memory: int = 1 << 29,
    ) -> None:
        self._specs, self._numbers = _unique(weight_formats(sites, candidates))
        self._sites, self._kinds, self._cache = tuple(sites), kinds, model.cache
        self._chain = Segments(model.ir)
        own = calibration_of(model) if data is None else data
        chosen = choose_samples(self._chain, own, sites, samples, kinds, samples_for_one(model.ir, own))
        self._feeds = chosen.batches(model.ir, own)
        self.used, self.runs = chosen.used, 0
        facts = (own.fingerprint, chosen.used, chosen.batch, chosen.length, sorted((kinds or {}).items()))
        self._key = measurement_key(model, "true loss", "spread", *facts) if model.cache is not None else None
        self._weights = QuantizedWeights(self._sites, self._specs, memory)
        self._here = [[i for i, s in enumerate(sites) if s.weight.name in segment.weights] for segment in self._chain]
        self._ready: dict[int, tuple[Boundary, Reference]] = {}
        self._known: dict[tuple[int, _Key], Floats] = {}

    @property
    def sites(self) -> int:
        """Length of an assignment."""
        return len(self._sites)

    def loss(self, assignment: Assignment) -> float:
        """Loss of one assignment: mean KL of a row in nats, or normalised squared error, summed over the outputs.

        Infinite where the output is infinite or NaN.

        Raises:
            ValueError: the assignment does not fit the sites and their candidates.
        """
        return float(self.losses([assignment])[0])

    def losses(self, assignments: Sequence[Assignment] | npt.NDArray[np.intp]) -> Floats:
        """Losses of many assignments, float64 [assignments]; cheaper than one by one where they begin alike."""
        return self.parts(assignments).mean(1)

    def noise(self, assignment: Assignment) -> float:
        """Standard error of `loss` over disjoint parts of the samples."""
        return _standard_error(self.parts([assignment])[0])

    def difference(self, first: Assignment, second: Assignment) -> tuple[float, float]:
        """loss(first) - loss(second), and its standard error: over the same parts of the samples, pair by pair."""
        one, two = self.parts([first, second])
        with np.errstate(invalid="ignore"):  # of two infinite losses the difference is NaN
            change = one - two
        return float(change.mean()), _standard_error(change)

    def parts(self, assignments: Sequence[Assignment] | npt.NDArray[np.intp]) -> Floats:
        """Losses on disjoint parts of the samples, float64 [assignments, parts]; their mean is the loss."""
        keys = [self._key_of(assignment) for assignment in assignments]
        for batch in range(len(self._feeds)):
            missing = [key for key in dict.fromkeys(keys) if not self._stored(batch, key)]
            if missing:
                boundary, _ = self._prepared(batch)
                self._walk(batch, missing, 0, boundary)
        found = [np.concatenate([self._known[batch, key] for batch in range(len(self._feeds))]) for key in keys]
        return np.array(found, np.float64).reshape(len(keys), PARTS * len(self._feeds))

    def _key_of(self, assignment: Assignment) -> _Key:
        """The formats by their number among the different ones of each site."""
        options = [int(option) for option in assignment]
        if len(options) != len(self._sites):
            raise ValueError(f"an assignment has one option for each of {len(self._sites)} sites, not {len(options)}")
        for site, option, numbers in zip(self._sites, options, self._numbers, strict=True):
            if not FLOAT <= option < len(numbers):
                raise ValueError(f"site {site.name} has no candidate {option}, it has {len(numbers)}")
        pairs = zip(options, self._numbers, strict=True)
        return tuple(FLOAT if option == FLOAT else numbers[option] for option, numbers in pairs)

    def _stored(self, batch: int, key: _Key) -> bool:
        """Whether a loss is known; from the cache it comes into memory."""
        if (batch, key) not in self._known and self._cache is not None:
            found = self._cache.get(self._cache_key(batch, key))
            if found is not None:
                self._known[batch, key] = found["losses"]
        return (batch, key) in self._known

    def _cache_key(self, batch: int, key: _Key) -> str:
        chosen = zip(self._sites, self._specs, key, strict=True)
        formats = sorted(f"{site.name} {specs[number]}" for site, specs, number in chosen if number != FLOAT)
        return Cache.key(self._key, batch, formats)

    def _prepared(self, batch: int) -> tuple[Boundary, Reference]:
        """The start of the chain and the float outputs for a batch; of one batch at a time."""
        if batch not in self._ready:
            start = self._chain.start(self._feeds[batch])
            self._ready = {batch: (start, Reference(self._chain.run(start), self._kinds, 1))}
        return self._ready[batch]

    def _walk(self, batch: int, keys: list[_Key], index: int, boundary: Boundary) -> None:
        """Evaluate assignments that agree before segment `index`, whose boundary this is."""
        while index < len(self._chain):
            segment: Segment = self._chain[index]
            index += 1
            branches = list(self._branches(keys, segment))
            if len(branches) > 1:
                for branch in branches:
                    self._walk(batch, branch, index, segment.run(boundary, self._changes(branch[0], segment)))
                return
            boundary = segment.run(boundary, self._changes(keys[0], segment))
        for key in keys:
            self._judge(batch, key, boundary)

    def _branches(self, keys: list[_Key], segment: Segment) -> Iterator[list[_Key]]:
        """Groups of assignments that agree on what a segment reads."""
        groups: dict[_Key, list[_Key]] = {}
        for key in keys:
            groups.setdefault(tuple(key[i] for i in self._here[segment.index]), []).append(key)
        yield from groups.values()

    def _changes(self, key: _Key, segment: Segment) -> dict[str, Array]:
        """All weights of a segment, float ones too, so that one session serves every assignment."""
        here = self._here[segment.index]
        return {str(self._sites[i].weight.name): self._weights.get(i, key[i]) for i in here}

    def _judge(self, batch: int, key: _Key, outputs: Boundary) -> None:
        _, reference = self._ready[batch]
        with np.errstate(invalid="ignore", over="ignore"):
            losses = reference.losses(outputs)
        if not np.isfinite(losses).all():
            losses = np.full_like(losses, np.inf)
        self.runs += 1
        self._known[batch, key] = losses
        if self._cache is not None:
            self._cache.put(self._cache_key(batch, key), {"losses": losses})


def held_back(model: Model, used: int, times: int = 1) -> Calibration | None:
    """Calibration samples that measuring did not use, spread; None if there are not enough for parts.

    Args:
        model: with calibration data.
        used: how many were used (`Sensitivity.samples`, `TrueLoss.used`).
        times: at most so many times as many.
    """
    rest = calibration_of(model).without_spread(used)
    return rest.spread(max(times * used, PARTS)) if rest.count >= PARTS else None


def _unique(rows: Sequence[Sequence[QuantSpec | None]]) -> tuple[list[list[QuantSpec]], list[list[int]]]:
    """For each site its different formats, and the number of each candidate among them (FLOAT for none)."""
    specs = [list(dict.fromkeys(spec for spec in row if spec is not None)) for row in rows]
    numbers = [
        [FLOAT if spec is None else known.index(spec) for spec in row] for row, known in zip(rows, specs, strict=True)
    ]
    return specs, numbers


def _standard_error(parts: Floats) -> float:
    if not np.isfinite(parts).all():
        return np.inf
    return float(parts.std(ddof=1) / np.sqrt(len(parts)))
