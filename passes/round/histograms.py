"""Histograms of activations, and the range of an 8-bit grid that fits one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.model import StaticRange

Array = npt.NDArray[Any]
_BINS = 2048
_FACTORS = np.geomspace(1.0, 0.25, 40)
LEVELS = 255


@dataclass
class Histogram:
    """Counts of the non-zero values between two ends that are known beforehand.

    Zeros are left out: every grid holds zero exactly, and behind a Relu they are most of the values.
    """

    low: float
    high: float
    counts: npt.NDArray[np.int64]

    @staticmethod
    def between(low: float, high: float) -> Histogram:
        """An empty one."""
        return Histogram(low, high if high > low else low + 1.0, np.zeros(_BINS, np.int64))

    def add(self, x: Array) -> None:
        """Count the values of an array."""
        self.counts += np.histogram(x[x != 0], _BINS, (self.low, self.high))[0]

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """Middles of the bins."""
        edges = np.linspace(self.low, self.high, _BINS + 1)
        return (edges[1:] + edges[:-1]) / 2

    def percentile(self, percent: float) -> tuple[float, float]:
        """Ends that leave out (100 - percent) / 2 percent on either side."""
        below = np.cumsum(self.counts) / max(self.counts.sum(), 1)
        tail = (100 - percent) / 200
        edges = np.linspace(self.low, self.high, _BINS + 1)
        first = int(np.searchsorted(below, tail, side="right"))  # bins that hold less than the tail are left out
        last = int(np.searchsorted(below, 1 - tail))
        low, high = float(edges[min(first, _BINS - 1)]), float(edges[min(last, _BINS - 1) + 1])
        return low if self.low < 0 and percent < 100 else self.low, high if percent < 100 else self.high

    def least_error(self) -> tuple[float, float]:
        """Ends of least expected squared error: rounding (step^2 / 12 each) inside, clipping outside."""
        x, n = self.centers, self.counts
        lows = self.low * _FACTORS if self.low < 0 else np.array([0.0])
        highs = self.high * _FACTORS if self.high > 0 else np.array([0.0])
        below = np.maximum(lows[:, None] - x, 0) ** 2 @ n
        above = np.maximum(x - highs[:, None], 0) ** 2 @ n
        step = (highs[None, :] - lows[:, None]) / LEVELS
        error = below[:, None] + above[None, :] + step**2 / 12 * n.sum()
        i, j = np.unravel_index(int(np.argmin(error)), error.shape)
        return float(lows[i]), float(highs[j])


def static_range(low: float, high: float, limit: float = np.inf) -> StaticRange:
    """The uint8 grid that covers [low, high] and holds zero exactly; no level lies above `limit`."""
    low, high = min(low, 0.0), min(max(high, 0.0), limit)
    span = high - low
    scale = np.float32(span / LEVELS)
    if scale < np.finfo(np.float32).tiny:  # nothing but zeros, or what float32 does not hold to all its digits
        scale = np.float32(1.0)
    zero = int(np.clip(np.rint(-low / scale), 0, LEVELS))
    while np.isfinite(limit) and (LEVELS - zero) * scale > np.float32(limit) > 0:
        scale = np.nextafter(scale, np.float32(0))
    return StaticRange(float(scale), zero)
