"""What a static grid does to the channels of a value that are scaled apart: its squared error, from counts.

One pass over the data counts |x| of every channel in bins of an eighth of an octave. From these the error of any
scales and any grid follows, so that many can be tried in no time; and there are two tables, one for each half of the
data, so that scales can be taken from one and judged on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.measure.stream import activations, calibration_of
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import Floats, enough_samples

_LEVELS = 255
_FIRST, _OCTAVES = -30, 50  # bins from 2^-30 to 2^20
_BINS = 8 * _OCTAVES
_EXPONENT_ONE, _MANTISSA = 127, 20  # of float32; bits that are left out of the 23
_SHARES = (1.0, 0.7, 0.5, 0.35)  # of the whole range, that a grid may span
HALVES = 2
_POSITIONS = 2048  # of a channel of a sample that are counted, evenly thinned out


class ChannelNoise:
    """Counts of one value.

    Args:
        counts: [halves, channels, bins].
        reach: [halves, channels], the largest |x|.
        unsigned: the value has no negative numbers, so that a grid spans one side only.

    Attributes:
        reach: as given.
    """

    def __init__(self, counts: npt.NDArray[Any], reach: Floats, *, unsigned: bool) -> None:
        self.reach = reach
        octave = np.exp2(_FIRST + np.arange(_OCTAVES))[:, None]
        self._edges = np.append((octave * (1 + np.arange(8) / 8)).reshape(-1), np.exp2(_FIRST + _OCTAVES))
        middle = (self._edges[1:] + self._edges[:-1]) / 2
        # Below each edge: how many there are, their sum and the sum of their squares, [moments, halves, channels].
        moments = np.stack([counts, counts * middle, counts * middle**2])
        self._below = np.cumsum(np.pad(moments, ((0, 0), (0, 0), (0, 0), (1, 0))), 3)
        self._levels = _LEVELS if unsigned else _LEVELS / 2

    def power(self, half: int) -> Floats:
        """[channels]: sum of squares."""
        return self._below[2, half, :, -1]

    def error(self, half: int, s: Floats, weight: Floats) -> float:
        """Squared error of the grid that suits one half best, after channel c was divided by s[c].

        Args:
            half: of the data.
            s: [channels], positive.
            weight: [channels], what an error in a channel costs.
        """
        whole = float((self.reach[half] / s).max(initial=0.0))
        return min(float(weight @ self._errors(half, s * whole * share)) for share in _SHARES)

    def _errors(self, half: int, ends: Floats) -> Floats:
        """[channels]: of grids that end at `ends`; what lies below half a step becomes zero."""
        step, below, channels = ends / self._levels, self._below[:, half], np.arange(len(ends))
        small = below[:, channels, np.searchsorted(self._edges, step / 2).clip(0, _BINS)]
        inside = below[:, channels, np.searchsorted(self._edges, ends).clip(0, _BINS)]
        count, total, squares = below[:, :, -1] - inside
        clipped = np.maximum(squares - 2 * ends * total + ends**2 * count, 0)
        return small[2] + (inside[0] - small[0]) * step**2 / 12 + clipped


def channel_noise(model: Model, axes: Mapping[str, int]) -> dict[str, ChannelNoise]:
    """Count values over the first and the second half of the calibration data.

    Neighbours are often alike (crops of one photograph), so the halves are not interleaved.

    Args:
        model: with calibration data.
        axes: of the channels, by the name of a value.
    """
    tables: dict[str, _Table] = {}
    data, limit = calibration_of(model), enough_samples(model)
    half = (data.count if limit is None else min(limit, data.count)) // HALVES
    for batch in activations(model, list(axes), limit):
        for name, array in batch.items():
            if name not in tables:
                tables[name] = _Table(array.shape[axes[name]])
            table = tables[name]
            first = min(max(half - table.seen, 0), len(array))
            for part, piece in enumerate((array[:first], array[first:])):
                if piece.size:
                    table.add(part, np.moveaxis(np.asarray(piece, np.float32), axes[name], 0), len(piece))
    return {name: ChannelNoise(t.counts, t.reach, unsigned=t.unsigned) for name, t in tables.items()}


class _Table:
    """What is being counted of one value."""

    def __init__(self, channels: int) -> None:
        self.seen, self.unsigned = 0, True
        self.counts = np.zeros((HALVES, channels, _BINS), np.int64)
        self.reach = np.zeros((HALVES, channels))

    def add(self, half: int, array: npt.NDArray[np.float32], samples: int) -> None:
        """Count [channels, ...] of so many samples."""
        rows = array.reshape(len(array), -1)
        self.seen += samples
        self.counts[half] += _count(rows[:, :: max(1, rows.shape[1] // (samples * _POSITIONS))])
        low, high = rows.min(1), rows.max(1)
        self.reach[half] = np.maximum(self.reach[half], np.maximum(-low, high))
        self.unsigned = self.unsigned and float(low.min()) >= 0


def _count(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """[channels, bins] of [channels, elements]; zeros are in none."""
    bits = (np.ascontiguousarray(rows).view(np.int32) & 0x7FFFFFFF) >> _MANTISSA
    bins = np.where(bits == 0, _BINS, (bits - 8 * (_EXPONENT_ONE + _FIRST)).clip(0, _BINS - 1))
    bins += (np.arange(len(rows), dtype=np.int32) * (_BINS + 1))[:, None]
    found = np.bincount(bins.reshape(-1), minlength=len(rows) * (_BINS + 1))
    return found.reshape(len(rows), _BINS + 1)[:, :_BINS]
