"""AutoRound: offsets of the rounding and scales, by the sign of their gradients."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.model import Model
from qcompiler.passes.round.reconstruction import Method, reconstruct, report, require
from qcompiler.pipeline import Pass, PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class AutoRound(Pass):
    """Learn the rounding and the clipping of a segment's weights together by signed gradient descent.

    Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
    (2309.05516). There an offset within half a step is learned and clipped; here the position of the weight itself,
    which with the same rates comes no farther, and a factor of its scale instead of those of its two ends.

    Attributes:
        steps: for each segment.
        rate: of offsets at the first step, in steps of the grid, and of scales, relative to them; 0: 1 / steps.
        batch: samples a step.
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        seed: of the order of samples.
    """

    steps: int = 200
    rate: float = 0.0
    batch: int = 8
    samples: int = 128
    tokens: int = 8192
    seed: int = 0

    def requires(self, model: Model) -> None:
        """Refuse wrong options, a model without data, or one that is lowered; say what to install."""
        require(self, model, ("rate",))

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights`; metrics hold each segment's error before and after."""
        rate = self.rate or 1 / self.steps
        method = Method("straight", "sign", rate, rate, 0.0, True, self.steps, self.batch, seed=self.seed)
        return report(self.registered_name(), reconstruct(model, method, self.samples, self.tokens, progress))
