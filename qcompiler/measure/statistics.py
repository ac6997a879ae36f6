"""What calibration data says about activations: per-channel ranges and histograms, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qcompiler.measure.stream import activations, measurement_key
from qcompiler.model import Model

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
_BINS = 4096


@dataclass
class ChannelStats:
    """Range and mean of each channel of one activation.

    Attributes:
        low, high, absmax, mean: float64 [channels].
        magnitude: float64 [channels], mean of |x|.
        count: elements seen in each channel.
    """

    low: Floats
    high: Floats
    absmax: Floats
    mean: Floats
    magnitude: Floats
    count: int


@dataclass
class Histogram:
    """How the values of one activation are distributed, over `len(counts)` equal bins of [-reach, reach].

    Attributes:
        counts: float64 [bins].
        reach: the ends of the bins.
        low, high: the exact extremes.
    """

    counts: Floats
    reach: float
    low: float
    high: float

    @property
    def centers(self) -> Floats:
        """Middles of the bins."""
        width = 2 * self.reach / len(self.counts)
        return np.asarray(width * (np.arange(len(self.counts)) + 0.5) - self.reach, np.float64)

    def percentile(self, percent: float) -> float:
        """The value below which `percent` of the elements lie, to within one bin; 0 and 100 are exact."""
        below = np.concatenate([[0.0], np.cumsum(self.counts)])
        edges = np.linspace(-self.reach, self.reach, len(below))
        target = percent / 100 * below[-1]
        first = int(np.searchsorted(below, target, "left"))
        if first == 0:
            return self.low
        share = (target - below[first - 1]) / max(below[first] - below[first - 1], 1e-300)
        value = edges[first - 1] + share * (edges[first] - edges[first - 1])
        return float(np.clip(value, self.low, self.high))


_Stats = TypeVar("_Stats", ChannelStats, Histogram)


def channel_statistics(
    model: Model, values: Sequence[str], axis: int | Mapping[str, int] = -1, limit: int | None = None
) -> dict[str, ChannelStats]:
    """Extremes and means of every channel of activations.

    Args:
        model: with calibration data; the result is cached if it has a cache.
        values: names of inputs or intermediate float values.
        axis: which axis holds the channels, for all or by name; -1 for those that a mapping leaves out.
        limit: samples, all if None.

    Returns:
        By name.
    """
    axes = {name: axis if isinstance(axis, int) else axis.get(name, -1) for name in values}

    def measure() -> dict[str, ChannelStats]:
        found: dict[str, ChannelStats] = {}
        for batch in activations(model, values, limit):
            for name, array in batch.items():
                new = _reduce(array, axes[name])
                found[name] = _merge(found[name], new) if name in found else new
        return found

    return _cached(model, ("channel statistics", list(axes.items()), limit), ChannelStats, measure)


def histograms(
    model: Model, values: Sequence[str], bins: int = _BINS, limit: int | None = None
) -> dict[str, Histogram]:
    """Distributions of activations, in one pass: the range doubles (two bins become one) when data exceeds it.

    Args:
        model: with calibration data; the result is cached if it has a cache.
        values: names of inputs or intermediate float values.
        bins: how many, a multiple of 4.
        limit: samples, all if None.
    """
    if bins < 4 or bins % 4:
        raise ValueError(f"{bins} bins: give a multiple of 4")

    def measure() -> dict[str, Histogram]:
        found: dict[str, Histogram] = {}
        for batch in activations(model, values, limit):
            for name, array in batch.items():
                if array.size:
                    found[name] = _count(found.get(name), array, bins)
        return found

    return _cached(model, ("histograms", list(values), bins, limit), Histogram, measure)


def _reduce(array: Array, axis: int) -> ChannelStats:
    wide = np.moveaxis(np.asarray(array), axis, -1) if array.ndim else array.reshape(1, 1)
    flat = wide.reshape(-1, wide.shape[-1])
    low, high = flat.min(0).astype(np.float64), flat.max(0).astype(np.float64)
    mean = flat.mean(0, dtype=np.float64)
    magnitude = np.abs(flat).mean(0, dtype=np.float64)
    return ChannelStats(low, high, np.maximum(-low, high), mean, magnitude, flat.shape[0])


def _merge(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    count = a.count + b.count
    return ChannelStats(
        np.minimum(a.low, b.low),
        np.maximum(a.high, b.high),
        np.maximum(a.absmax, b.absmax),
        a.mean + (b.mean - a.mean) * (b.count / count),
        a.magnitude + (b.magnitude - a.magnitude) * (b.count / count),
        count,
    )


def _count(before: Histogram | None, array: Array, bins: int) -> Histogram:
    flat = np.asarray(array, np.float32).ravel()
    low, high = float(flat.min()), float(flat.max())
    biggest = max(-low, high, 1e-30)
    h = before or Histogram(np.zeros(bins), biggest, low, high)
    counts, reach = h.counts, h.reach
    while reach < biggest:
        pairs = counts.reshape(-1, 2).sum(1)
        counts = np.pad(pairs, bins // 4)
        reach *= 2
    place = ((flat + np.float32(reach)) * np.float32(bins / (2 * reach))).astype(np.int32)
    np.clip(place, 0, bins - 1, out=place)
    new = np.bincount(place, minlength=bins).astype(np.float64)
    return Histogram(counts + new, reach, min(low, h.low), max(high, h.high))


def _cached(
    model: Model, parts: tuple[object, ...], kind: type[_Stats], measure: Callable[[], dict[str, _Stats]]
) -> dict[str, _Stats]:
    key = measurement_key(model, *parts)
    if model.cache is None or key is None:
        return measure()
    stored = model.cache.get(key)
    if stored is not None:
        return {str(name): _unpack(kind, stored, i) for i, name in enumerate(stored["names"])}
    found = measure()
    arrays: dict[str, Array] = {"names": np.array(list(found), dtype=np.str_)}
    for i, stats in enumerate(found.values()):
        arrays |= {f"{i}.{f.name}": np.asarray(getattr(stats, f.name)) for f in fields(stats)}
    model.cache.put(key, arrays)
    return found


def _unpack(kind: type[_Stats], stored: Mapping[str, Array], index: int) -> _Stats:
    arrays = {f.name: stored[f"{index}.{f.name}"] for f in fields(kind)}
    values: dict[str, Any] = {name: a.item() if a.ndim == 0 else a for name, a in arrays.items()}
    return kind(**values)
