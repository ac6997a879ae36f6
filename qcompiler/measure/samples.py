"""How many samples say enough, and which the losses of a model are measured on.

These are the same for single changes, pairs and whole allocations.

They are spread over the data: neighbouring samples are often parts of one photograph or text. (mobilenet_v2, 25
allocations: the loss on the first 16 of 256 crops is .72 times that on 64 others, on the next 16 it is .12 times, on
16 spread ones 1.04 times.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration import Calibration
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.loss import Kind, Reference
from qcompiler.measure.segments import Segments
from qcompiler.measure.shapes import site_shapes
from qcompiler.measure.shorten import shortened

_BATCH_WORK = 1 << 26  # weights times samples of a batch
_INPUT_WORK = 32  # an input element counts as so many weights
_ENOUGH_ROWS = 512  # of the output; a language model has as many in one sample
_LEAST_ROWS, _MOST_ELEMENTS = 128, 1 << 24  # fewer rows where there are many classes: they cost the most time
_ROWS_OF_ONE = 128  # that sites read of a sample of most models, at least: tokens, pixels
_MOST_OUTPUT = 1 << 25  # elements of a batch's largest output: a few arrays of that size are alive at once


@dataclass(frozen=True)
class Samples:
    """Samples of calibration data, evenly spread, as batches.

    Attributes:
        used: how many samples.
        length: positions of a text that are kept; None: all.
        batch: samples in a batch at most.
    """

    used: int
    length: int | None
    batch: int

    def batches(self, model: ir.Model, data: Calibration) -> list[Mapping[str, npt.NDArray[Any]]]:
        """The feeds of every batch."""
        return [shortened(model, feeds, self.length) for feeds in data.spread(self.used).batches(self.batch)]


def samples_for_one(model: ir.Model, data: Calibration) -> int:
    """How many samples say as much about weights as one image or text does: 1 for these.

    More where a sample is a single row or a few of them, as of a table: where a pass takes a number of samples, so many
    of them count as one.

    Args:
        model: float; one sample is run where its inputs are that small.
        data: of the model.
    """
    for feeds in data.batches(1, 1):
        lines = [a.size if a.dtype.kind in "iu" else a.size // a.shape[-1] for a in feeds.values() if a.ndim and a.size]
        count = max((len(a) for a in feeds.values() if a.ndim), default=1)  # more than one where the model wants that
        if max(lines, default=_ROWS_OF_ONE) >= _ROWS_OF_ONE * count:
            return 1
        sites = find_sites(model)
        shapes = site_shapes(model, sites, feeds)
        rows = [_rows_made(node, shapes) for site in sites for node in site.users if node.op_type != "Gather"]
        return max(1, _ROWS_OF_ONE * count // max(1, *rows)) if rows else 1
    return 1


def _rows_made(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the product that an operation is."""
    shape = shapes[str(node.outputs[0].name)]
    return prod(shape) // max(1, shape[1 if node.op_type in ("Conv", "ConvTranspose") else -1])


def choose_samples(
    chain: Segments,
    data: Calibration,
    sites: Sequence[Site],
    samples: int | None = None,
    kinds: Mapping[str, Kind] | None = None,
    together: int = 1,
) -> Samples:
    """So many samples, or enough of them.

    Args:
        chain: of the model.
        data: of the model; not empty.
        sites: that are measured.
        samples: None or 0: enough for 512 rows of output (fewer if they are long), at most one batch (16, more for
            small models) times `together`; of texts longer than that the beginning.
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        together: samples that count as one (`samples_for_one`).
    """
    rows, width = _one_sample(chain, data, kinds)
    most = max(1, min(_largest_batch(data, sites), _MOST_OUTPUT // (rows * width)))
    enough = _enough(data, rows, width, most * together)
    used, length = (min(samples, data.count), None) if samples else enough
    return Samples(used, length, -(-used // -(-used // most)))  # batches of one size: each counts as much


def _largest_batch(data: Calibration, sites: Sequence[Site]) -> int:
    """16 samples, more for small models and inputs; the same on every machine, since it is part of cache keys."""
    size = max(sum(site.count for site in sites), 1)
    for feeds in data.batches(1, 1):
        size = max(size, _INPUT_WORK * sum(array.size for array in feeds.values()))
    return int(np.clip(_BATCH_WORK // size, 16, _ENOUGH_ROWS))


def _one_sample(chain: Segments, data: Calibration, kinds: Mapping[str, Kind] | None) -> tuple[int, int]:
    """Rows that a sample gives, and the elements of the largest output for each."""
    rows, width = 1, 1
    for feeds in data.batches(1, 1):
        outputs = chain.run(chain.start(feeds))
        rows = max(Reference(outputs, kinds, 1).rows, 1)
        width = max(1, max((a.size for a in outputs.values()), default=1) // rows)
    return rows, width


def _enough(data: Calibration, rows: int, width: int, most: int) -> tuple[int, int | None]:
    """Samples that give enough rows of output, at most so many; and rows if a single sample has too many."""
    wanted = int(np.clip(_MOST_ELEMENTS // width, _LEAST_ROWS, _ENOUGH_ROWS))
    used = int(np.clip(-(-wanted // rows), 1, min(most, data.count)))
    return used, wanted if rows > wanted else None
