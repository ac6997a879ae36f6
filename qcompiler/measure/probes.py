"""Single changes to a model and what they do, for one batch of data (see `sensitivity`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import PerRowGroup, PerTensor, QuantSpec
from qcompiler.formats.varied import VariedSpec, effective
from qcompiler.graph.sites import Site
from qcompiler.measure.decoded import decoded_weight
from qcompiler.measure.loss import Kind, Reference
from qcompiler.measure.patches import site_inputs
from qcompiler.measure.segments import Boundary, Segment, Segments

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
_INPUT_ROWS = 512  # for local errors: of the input
_WEIGHT_ROWS = 128  # and of the weight matrix


class Probes:
    """Changes of single weights, judged by the model's own output on one batch.

    One boundary is alive at a time: ask for sites in the order of the graph; going back starts over.

    Args:
        chain: of the float model.
        feeds: the batch.
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        width: numbers in a sketch.
        number: of the batch; seeds the sketch.
    """

    def __init__(
        self,
        chain: Segments,
        feeds: Mapping[str, Array],
        kinds: Mapping[str, Kind] | None = None,
        width: int = 8192,
        number: int = 0,
    ) -> None:
        self._chain, self.number = chain, number
        self._place = {own.name: segment.index for segment in chain for own in segment.sites}
        self._start = chain.start(feeds)
        self._boundary: Boundary = self._start
        self._position = 0
        self.reference = Reference(chain.run(self._start), kinds, width, seed=number)

    def probe(self, site: Site, spec: QuantSpec) -> tuple[Floats, npt.NDArray[np.float32]]:
        """Loss on parts of the batch (float64 [8]) and sketch of the change, with one site quantized.

        A format that makes outputs infinite or NaN has infinite loss, and a sketch of zeros.
        """
        change = {_weight(site): decoded_weight(site, effective(site.matrix(), spec))}
        segment, boundary = self.before(self._place[site.name])
        return self.judge(segment, boundary, change)

    def judge(
        self, segment: Segment, boundary: Boundary, change: Mapping[str, Array]
    ) -> tuple[Floats, npt.NDArray[np.float32]]:
        """As `probe`, for any changed weights (arrays by initializer), from a boundary before a segment."""
        after = segment.run(boundary, change)
        outputs = self._chain.run(after, segment.index + 1, change)
        with np.errstate(invalid="ignore", over="ignore"):
            losses, sketch = self.reference.measure(outputs)
        if not (np.isfinite(losses).all() and np.isfinite(sketch).all()):
            return np.full_like(losses, np.inf), np.zeros_like(sketch)
        return losses, sketch

    def local_errors(self, site: Site, specs: Sequence[QuantSpec]) -> Floats:
        """E||x dW^T||^2 at the site's own output for each format, on a part of the rows of x and W.

        Where the weight multiplies nothing (a look-up), ||dW||^2.
        """
        x = self._inputs(site)
        groups = 1 if x is None else len(x)
        matrix = site.matrix().reshape(groups, -1, site.columns)
        step = max(1, -(-matrix.shape[0] * matrix.shape[1] // (_WEIGHT_ROWS * groups)))
        errors: list[float] = []
        for spec in specs:
            # scales that rows share would be other ones for a part of them, and so would some transforms
            whole = isinstance(spec.granularity, PerTensor | PerRowGroup) or isinstance(spec, VariedSpec)
            part = np.ascontiguousarray(matrix if whole else matrix[:, ::step])
            flat = part.reshape(-1, site.columns)
            change = (effective(flat, spec).decode() - flat).reshape(part.shape)
            change = change[:, ::step] if whole else change
            product = change if x is None else np.matmul(x, change.swapaxes(1, 2))
            errors.append(float(np.einsum("gij,gij->", product, product, dtype=np.float64)))
        return np.array(errors)

    def _inputs(self, site: Site) -> npt.NDArray[np.float32] | None:
        """Rows that multiply the weight in its first segment: float32 [groups, T, columns]."""
        segment, boundary = self.before(self._place[site.name])
        for user in site.users:
            data = None if user.op_type == "Gather" else user.inputs[0]
            name = None if data is None else data.name
            if name is not None and (name in segment.made or name in boundary):
                array = segment.read(boundary, [name])[name]
                return site_inputs(site, array, _INPUT_ROWS, user)
        return None

    def before(self, index: int) -> tuple[Segment, Boundary]:
        """A segment, and the float model's boundary before it."""
        if index < self._position:
            self._position, self._boundary = 0, self._start
        while self._position < index:
            self._boundary = self._chain[self._position].run(self._boundary)
            self._position += 1
        return self._chain[index], self._boundary


def _weight(site: Site) -> str:
    assert site.weight.name is not None
    return site.weight.name
