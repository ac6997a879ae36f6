"""MobileQuant: the scales of all folds, the clipping of weights and activation ranges, learned together end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.errors import Refusal
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import find_folds, layer_inputs
from qcompiler.passes.transform.learning import Learning, static_targets, value_ends
from qcompiler.pipeline import PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class MobileQuant(Learning):
    """Learn s for every fold behind a norm, a value projection, a gated product or a layer, from s = 1.

    Rotary pairs and grouped heads share what they must. The twin rounds weights and activations as the plan says; what
    it gives is compared with the float model's outputs. With static activations a grid goes with the scales of its
    channels, and its ends are learned beside them. Afterwards the scales are folded: the float function stays.

    The paper starts from SmoothQuant's scales: run `smooth` before, where weights of 8 bits can take that.

    Source: Tan et al., MobileQuant (2408.13933).

    Attributes:
        scale_rate: of the logarithms of the scales.
        share_rate: of the clipping of weights: of the share of a group's range that its grid spans.
        range_rate: of the ends of static activation grids, in shares of their span.
        codes: also round the weights, with the learned clipping, and keep the learned activation ranges; else passes
            for that come after this one, and choose them anew.
    """

    rates: ClassVar[tuple[str, ...]] = ("scale_rate", "share_rate", "range_rate")
    scale_rate: float = 4e-2
    share_rate: float = 3e-3
    range_rate: float = 3e-3
    codes: bool = False

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Learn, and fold what is better on the samples held back."""
        from qcompiler.passes.transform.learned_scales import LearnedScales
        from qcompiler.passes.transform.transformed_twin import TransformedTwin

        folds, refused = find_folds(model, layer_inputs(model), lambda _fold: None)
        if not folds and not self.codes:
            reason = Refusal(model.name, "there is nothing to scale")
            return PassReport(self.registered_name(), 0, (*refused, reason))
        scales, targets = LearnedScales(folds), static_targets(model)
        twin = TransformedTwin(model, scales, targets, value_ends(model, targets, scales.shape))
        rates = {"scale": self.scale_rate, "share": self.share_rate, "range": self.range_rate}
        losses = self.learn(model, twin, rates, progress, all_of_it=self.codes)
        report = self.report(losses, len(folds), refused)
        if report.metrics["kept"]:
            for fold, s in zip(folds, scales.found(), strict=True):
                fold.scale(s)
        if self.codes:
            model.ranges.update(twin.ranges())
            model.weights.update(twin.codes(model))
        return report
