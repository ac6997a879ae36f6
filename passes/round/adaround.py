"""AdaRound: learn for every weight whether it is rounded up or down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.errors import BadOption
from qcompiler.model import Model
from qcompiler.passes.round.reconstruction import Method, Reconstruction


@dataclass(frozen=True)
class AdaRound(Reconstruction):
    """Up or down by the error of each segment's output, from a fraction in between that is pressed to 0 or 1.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2004.10568), on segments
    instead of single layers as in BRECQ (2102.05426).

    Attributes (beside those of `Reconstruction`):
        rate: of Adam, in units of the variable behind the fraction.
        warm: share of the steps before the fractions are pressed to 0 and 1.
    """

    rates: ClassVar[tuple[str, ...]] = ("rate", "warm")
    steps: int = 400
    rate: float = 3e-2
    warm: float = 0.2

    @property
    def method(self) -> Method:
        """Soft codes alone, by Adam."""
        return Method("soft", "adam", self.rate, 0.0, 0.0, False, self.steps, self.batch, self.warm, self.seed)

    def requires(self, model: Model) -> None:
        """As all, and a warm-up that ends."""
        super().requires(model)
        if self.warm >= 1:
            raise BadOption(f"option 'warm' is {self.warm}", "pass 'adaround'", "give less than 1, such as 0.2")
