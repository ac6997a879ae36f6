"""AdaQuant: weights, their scales and the biases that are there, by Adam on each segment's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.round.reconstruction import Method, Reconstruction


@dataclass(frozen=True)
class AdaQuant(Reconstruction):
    """Learn the weights before their rounding (gradients pass straight through it), their scales and biases.

    Source: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets" (2006.10518), on segments
    instead of single layers. Its rates are in units of the weights; here they are in steps of each weight's grid, so
    that they suit layers of all sizes. Ranges of activations are those of `activation-ranges`.

    Attributes (beside those of `Reconstruction`):
        rate: of weights, in steps of the grid.
        scale_rate: of scales, relative to them.
        bias_rate: of biases, in units of the layers' outputs.
    """

    rates: ClassVar[tuple[str, ...]] = ("rate", "scale_rate", "bias_rate")
    rate: float = 5e-3
    scale_rate: float = 1e-3
    bias_rate: float = 1e-3

    @property
    def method(self) -> Method:
        """Positions, scales and biases, by Adam."""
        rates = (self.rate, self.scale_rate, self.bias_rate)
        return Method("straight", "adam", *rates, True, self.steps, self.batch, seed=self.seed)
