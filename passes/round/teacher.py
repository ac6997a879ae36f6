"""The float model's outputs on calibration samples, again and again, without holding them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from qcompiler.measure.runner import Runner
from qcompiler.measure.segments import Segments
from qcompiler.model import Model

Array = npt.NDArray[Any]


class Teacher:
    """Outputs of the float model by sample.

    A language model's outputs are a thousand times larger than what its last layer makes them of: where that is so,
    the values before the last segment are kept and the segment is run again for each call.

    Args:
        model: whose graph is float.
        feeds: the samples.
    """

    def __init__(self, model: Model, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._names = [str(value.name) for value in model.graph.outputs]
        self._chain = Segments(model.ir)
        before = self._chain[-2].after if len(self._chain) > 1 else ()
        self._kept: list[dict[str, Array]] = []
        self._again = False
        if not feeds:
            return
        whole = Runner(model.ir)
        first = whole(feeds[0])
        if before:
            shorter = Runner(model.ir, outputs=before)
            kept = shorter(feeds[0])
            self._again = 2 * _bytes(kept) < _bytes(first)
            if self._again:
                self._kept = [kept, *(shorter(feed) for feed in feeds[1:])]
                return
        self._kept = [first, *(whole(feed) for feed in feeds[1:])]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> list[Array]:
        """The outputs of one sample, in the graph's order."""
        kept = self._kept[index]
        found = self._chain.run(kept, start=len(self._chain) - 1) if self._again else kept
        return [found[name] for name in self._names]


def _bytes(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())
