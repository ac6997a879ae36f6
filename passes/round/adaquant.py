"""AdaQuant: weights, their scales and the biases that are there, by Adam on each segment's output."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.model import Model
from qcompiler.passes.round.reconstruction import Method, reconstruct, report, require
from qcompiler.pipeline import Pass, PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class AdaQuant(Pass):
    """Learn the weights before their rounding (gradients pass straight through it), their scales and biases.

    Source: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets" (2006.10518), on segments
    instead of single layers. Its rates are in units of the weights; here they are in steps of each weight's grid, so
    that they suit layers of all sizes. Ranges of activations are those of `activation-ranges`.

    Attributes:
        steps: for each segment.
        rate: of weights, in steps of the grid.
        scale_rate: of scales, relative to them.
        bias_rate: of biases, in units of the layers' outputs.
        batch: samples a step.
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        seed: of the order of samples.
    """

    steps: int = 200
    rate: float = 5e-3
    scale_rate: float = 1e-3
    bias_rate: float = 1e-3
    batch: int = 8
    samples: int = 128
    tokens: int = 8192
    seed: int = 0

    def requires(self, model: Model) -> None:
        """Refuse wrong options, a model without data, or one that is lowered; say what to install."""
        require(self, model, ("rate", "scale_rate", "bias_rate"))

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights` and `model.bias_shift`; metrics hold each segment's error before and after."""
        rates = (self.rate, self.scale_rate, self.bias_rate)
        method = Method("straight", "adam", *rates, True, self.steps, self.batch, seed=self.seed)
        return report(self.registered_name(), reconstruct(model, method, self.samples, self.tokens, progress))
