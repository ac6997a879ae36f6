"""What losses are measured on (a chain, batches of data), and the store of what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import QuantSpec
from qcompiler.graph.sites import Site
from qcompiler.measure.cache import Cache
from qcompiler.measure.loss import Kind
from qcompiler.measure.probes import Probes
from qcompiler.measure.samples import choose_samples, samples_for_one
from qcompiler.measure.segments import Segments
from qcompiler.measure.stream import calibration_of, measurement_key
from qcompiler.model import Model
from qcompiler.plan import SitePlan

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Option = QuantSpec | SitePlan | None
Menus = Mapping[str, Sequence[Option]] | Sequence[Sequence[Option]]
_SKETCH = 8192


class Store:
    """Results by content: in the model's cache, so that a killed run goes on; else while this object lives."""

    def __init__(self, model: Model, *parts: object) -> None:
        self._cache = model.cache
        self._key = measurement_key(model, "sensitivity", *parts)
        self._held: dict[str, dict[str, Array]] = {}
        self.probes = 0

    def find(self, *parts: object) -> dict[str, Array] | None:
        """What was stored for these parts."""
        key = Cache.key(self._key, *parts)
        return self._held.get(key) if self._cache is None else self._cache.get(key)

    def keep(self, arrays: dict[str, Array], *parts: object) -> None:
        """Store a result."""
        key = Cache.key(self._key, *parts)
        if self._cache is None:
            self._held[key] = arrays
        else:
            self._cache.put(key, arrays)

    def get(self, make: Callable[[], dict[str, Array]], *parts: object) -> dict[str, Array]:
        """What was stored for these parts, or what `make` gives now."""
        stored = self.find(*parts)
        if stored is None:
            stored = make()
            self.keep(stored, *parts)
        return stored

    def probe(self, probes: Probes, site: Site, spec: QuantSpec) -> tuple[Floats, npt.NDArray[np.float32]]:
        """One probe's losses [parts] and sketch [width]."""

        def run() -> dict[str, Array]:
            self.probes += 1
            losses, sketch = probes.probe(site, spec)
            return {"losses": losses, "sketch": sketch}

        stored = self.get(run, "probe", probes.number, site.name, str(spec))
        return stored["losses"], stored["sketch"]


class Experiment:
    """A model cut into a chain, the batches it is judged on, and the store of what they showed.

    Args:
        model: float, with calibration data.
        sites: of `model`.
        candidates: formats by site name, or in the order of `sites`.
        samples, kinds: as `sensitivity.sensitivities`.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        candidates: Menus,
        samples: int | None = None,
        kinds: Mapping[str, Kind] | None = None,
    ) -> None:
        self.sites, self.specs = tuple(sites), weight_formats(sites, candidates)
        self.chain, data = Segments(model.ir), calibration_of(model)
        chosen = choose_samples(self.chain, data, sites, samples, kinds, samples_for_one(model.ir, data))
        self.samples = chosen.used
        self.batches = chosen.batches(model.ir, data)
        self.store = Store(model, "spread", chosen.used, chosen.batch, chosen.length, sorted((kinds or {}).items()))
        self._kinds = kinds
        self._last: Probes | None = None

    def probes(self, number: int) -> Probes:
        """Of one batch; the one that was used last is kept."""
        if self._last is None or self._last.number != number:
            width = max(1, _SKETCH // len(self.batches))
            self._last = Probes(self.chain, self.batches[number], self._kinds, width, number)
        return self._last

    @cached_property
    def order(self) -> list[int]:
        """Positions of the sites in the order of the graph: boundaries are then made in one walk along the chain."""
        return sorted(range(len(self.sites)), key=lambda i: (self.segments[i], i))

    @cached_property
    def segments(self) -> list[int]:
        """For each site the position of its (first) segment."""
        place = {own.name: segment.index for segment in self.chain for own in segment.sites}
        return [place[site.name] for site in self.sites]


def weight_formats(sites: Sequence[Site], candidates: Menus) -> tuple[tuple[QuantSpec | None, ...], ...]:
    """For each site the formats of its weight; of a SitePlan only the weight counts, None is float."""
    rows = [candidates[s.name] for s in sites] if isinstance(candidates, Mapping) else list(candidates)
    return tuple(tuple(o.weight if isinstance(o, SitePlan) else o for o in row) for row in rows)
