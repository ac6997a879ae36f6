"""How good outputs are against the original's, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qcompiler.evaluate.classes import kinds_of_outputs
from qcompiler.evaluate.fidelity import FidelityMeter, output_loss
from qcompiler.measure.loss import Kind
from qcompiler.target import Feeds, Outputs


class Score:
    """Fidelity and mean loss over batches; what a batch weighs is its number of samples.

    Args:
        kinds: what each output is, so that it is the same whatever the data; None: the first batch decides.

    Attributes:
        kinds: as given, or as decided.
        samples: so far.
    """

    def __init__(self, kinds: Mapping[str, Kind] | None = None) -> None:
        self.kinds: Mapping[str, Kind] = kinds or {}
        self._meter, self._loss = None if kinds is None else FidelityMeter(kinds), 0.0
        self.samples = 0

    def add(self, feeds: Feeds, reference: Outputs, outputs: Outputs) -> None:
        """Count one batch in.

        Args:
            feeds: the inputs, which say how many samples these are.
            reference: the original's outputs.
            outputs: of the compiled model, in the same shapes.
        """
        count = rows([feeds])
        if self._meter is None:
            self.kinds = kinds_of_outputs(feeds, reference)
            self._meter = FidelityMeter(self.kinds)
        self._meter.add(reference, outputs)
        self._loss += float(output_loss(reference, outputs)) * count
        self.samples += count

    @property
    def loss(self) -> float | None:
        """Mean loss of a sample: KL for class scores, else normalised squared error; None where it is not finite."""
        found = self._loss / max(self.samples, 1)
        return found if np.isfinite(found) else None

    @property
    def fidelity(self) -> dict[str, float | None]:
        """sqnr_db, kl and top1_agreement; None where undefined or not finite."""
        found = (self._meter or FidelityMeter()).result()
        return {name: None if v is None or not np.isfinite(v) else float(v) for name, v in found.items()}


def rows(batches: list[Feeds]) -> int:
    """Samples in some batches: the length of the first input that has axes, 1 where none has."""
    return sum(next((len(a) for a in feeds.values() if a.ndim), 1) for feeds in batches)
