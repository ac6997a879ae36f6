"""Activations of a model over its calibration data, a few at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration import Calibration
from qcompiler.errors import BadData
from qcompiler.measure.cache import Cache, fingerprint
from qcompiler.measure.runner import Runner
from qcompiler.measure.segments import Segments
from qcompiler.model import Model

Array = npt.NDArray[Any]
_ALIVE_BYTES = 8 << 20  # of what is asked for in one segment; ONNX Runtime needs several times as much
_LARGEST_BATCH = 32


def calibration_of(model: Model) -> Calibration:
    """The model's calibration data.

    Raises:
        BadData: there is none.
    """
    if model.calibration is None or model.calibration.count == 0:
        raise BadData("there is no calibration data", model.name, "give some, or let the compiler make it")
    return model.calibration


def activations(
    model: Model, values: Iterable[str], limit: int | None = None, segments: Segments | None = None
) -> Iterator[dict[str, Array]]:
    """Stream the arrays of `values` over the calibration data.

    Args:
        model: its graph may be float or lowered.
        values: names of inputs or intermediate values of the main graph.
        limit: samples, evenly spread over the data; all if None.
        segments: of the model's graph, if there is one already.

    Yields:
        Name -> array for some of the values and one batch. Every value comes once a batch; the batches are
        as large as 8 MB of activations alive at a time allow.
    """
    wanted = tuple(dict.fromkeys(values))
    chain = Segments(model.ir) if segments is None else segments
    whole = calibration_of(model)
    data = whole if limit is None else whole.spread(limit)
    made = {name for segment in chain for name in segment.made}
    outside = tuple(name for name in wanted if name not in made)
    early = Runner(model.ir, outputs=outside) if outside else None
    size = 1
    for feeds in data.batches(1, 1):
        alive = max((_bytes(found) for found in _one_batch(chain, early, wanted, feeds)), default=1)
        size = int(np.clip(_ALIVE_BYTES // max(alive, 1), 1, _LARGEST_BATCH))
    for feeds in data.batches(size):
        yield from _one_batch(chain, early, wanted, feeds)


def _one_batch(
    chain: Segments, early: Runner | None, wanted: Sequence[str], feeds: Mapping[str, Array]
) -> Iterator[dict[str, Array]]:
    if early is not None:
        yield early(feeds)
    boundary = chain.start(feeds)
    last = max((s.index for s in chain if any(name in s.made for name in wanted)), default=-1)
    for segment in list(chain)[: last + 1]:
        here = tuple(name for name in wanted if name in segment.made)
        if segment.index == last:
            yield segment.read(boundary, here)
            return
        found = segment.run(boundary, extra_outputs=here)
        boundary = found
        if here:
            yield {name: found[name] for name in here}


def _bytes(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())


def measurement_key(model: Model, *parts: object) -> str | None:
    """The key of a measurement on this graph and this calibration data; None where nothing is cached."""
    if model.cache is None:
        return None
    return Cache.key(fingerprint(model.ir), calibration_of(model).fingerprint, *parts)
