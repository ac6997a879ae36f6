"""AutoRound: offsets of the rounding and scales, by the sign of their gradients."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.passes.round.reconstruction import Method, Reconstruction


@dataclass(frozen=True)
class AutoRound(Reconstruction):
    """Learn the rounding and the clipping of a segment's weights together by signed gradient descent.

    Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
    (2309.05516). There an offset within half a step is learned and clipped; here the position of the weight itself,
    which with the same rates comes no farther, and a factor of its scale instead of those of its two ends.

    Attributes (beside those of `Reconstruction`):
        rate: of offsets at the first step, in steps of the grid, and of scales, relative to them; 0: 1 / steps.
    """

    rate: float = 0.0

    @property
    def method(self) -> Method:
        """Positions and scales, by signs and rates that fall to zero."""
        rate = self.rate or 1 / self.steps
        return Method("straight", "sign", rate, rate, 0.0, True, self.steps, self.batch, seed=self.seed)
