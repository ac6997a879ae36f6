"""AdaRound: learn for every weight whether it is rounded up or down."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.errors import BadOption
from qcompiler.model import Model
from qcompiler.passes.round.reconstruction import Method, reconstruct, report, require
from qcompiler.pipeline import Pass, PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class AdaRound(Pass):
    """Up or down by the error of each segment's output, from a fraction in between that is pressed to 0 or 1.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2004.10568), on segments
    instead of single layers as in BRECQ (2102.05426).

    Attributes:
        steps: for each segment.
        rate: of Adam, in units of the variable behind the fraction.
        warm: share of the steps before the fractions are pressed to 0 and 1.
        batch: samples a step.
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        seed: of the order of samples.
    """

    steps: int = 400
    rate: float = 3e-2
    warm: float = 0.2
    batch: int = 8
    samples: int = 128
    tokens: int = 8192
    seed: int = 0

    def requires(self, model: Model) -> None:
        """Refuse wrong options, a model without data, or one that is lowered; say what to install."""
        require(self, model, ("rate", "warm"))
        if self.warm >= 1:
            raise BadOption(f"option 'warm' is {self.warm}", "pass 'adaround'", "give less than 1, such as 0.2")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights`; metrics hold each segment's error before and after."""
        method = Method("soft", "adam", self.rate, 0.0, 0.0, False, self.steps, self.batch, self.warm, self.seed)
        return report(self.registered_name(), reconstruct(model, method, self.samples, self.tokens, progress))
