"""Tune: learn scales, codes, activation ranges and biases so that the outputs come back to those of the float model.

Codes that are rounded layer by layer, and ranges that are chosen one by one, leave errors that add up. Gradient
descent on the error of the model's own output (knowledge distillation, no labels) finds better ones in a few passes
over the calibration data. Scales, ranges and biases are few, so that they learn little by heart; codes only move
where many samples push them the same way, since each begins within 0.4 steps of where it was.

Sources: the end-to-end phase of EfficientQAT (2407.11062) for scales of groups; LSQ+ (2004.09576) for ranges.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompiler.errors import BadModel, MissingExtra, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.round.lesson import Feed, Lesson
from qcompiler.passes.round.quantized_values import Target, choose_values
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.pipeline import Pass, PassReport, Refusal, check_numbers
from qcompiler.progress import Progress

if TYPE_CHECKING:
    from qcompiler.passes.round.tuned_twin import TunedTwin

_TORCH = 200_000_000  # bytes of the program
_DECAY = (0.9, 0.95)  # of Adam's averages: there are only dozens of steps


@dataclass(frozen=True)
class Tune(Pass):
    """Learn `model.weights`, `model.ranges` and `model.bias_shift` (Adam, rates falling to zero).

    The last eighth of the data is held back: if the outputs of these samples don't come closer, nothing is changed.

    Attributes:
        epochs: passes over the data.
        patience: epochs after which it stops if the loss on the samples held back has not fallen, nor that of the mean
            of all steps of the last of them, which shows early what falling rates lead to; 0: never.
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        batch: samples from all over the data that one step looks at.
        range_rate: of learning the ends of a grid, in shares of its span.
        scale_rate: of learning the scales of weights, relative to them; 0 leaves them alone.
        code_rate: of learning codes, in steps of the grid; 0 leaves them alone, which takes half of the memory.
        bias_rate: of learning biases that are there, in units of the outputs of the layers.
        optional: change nothing and say so, instead of an error, where torch is not installed or the model has
            operations without gradients.
        seed: of the order of the data.
    """

    epochs: int = 3
    patience: int = 1
    samples: int = 256
    tokens: int = 32768
    batch: int = 4
    range_rate: float = 1e-3
    scale_rate: float = 4e-3
    code_rate: float = 0.0
    bias_rate: float = 3e-4
    optional: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rates = ("range_rate", "scale_rate", "code_rate", "bias_rate", "seed", "patience")
        check_numbers(self, ("epochs", "samples", "tokens", "batch"), rates)

    def requires(self, model: Model) -> None:
        """Refuse a model that is lowered, not rounded, or without data; say what to install."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if not self.optional and not model.weights and not model.ranges:
            raise PassRefused("nothing is quantized yet", where=model.name, fix="run it after a rounding pass")
        if model.calibration is None:
            raise PassRefused("tuning needs calibration data", where=model.name)
        if not self.optional and importlib.util.find_spec("torch") is None:
            raise MissingExtra("torch", "tuning of scales and biases")

    def adds_bytes(self, model: Model) -> int:
        """Of torch, and of the twin's weights and gradients, most of them in bfloat16."""
        if importlib.util.find_spec("torch") is None:
            return 0
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        return _TORCH + weights * (1 if self.code_rate == 0 else 4)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Learn; metrics hold the loss on held-back samples before and after."""
        if importlib.util.find_spec("torch") is None:
            progress.note("tune: scales and biases stay as they are; pip install 'qcompiler[torch]' to learn them")
            return self._nothing(model, "torch is not installed")
        from qcompiler.passes.round.tuned_twin import TunedTwin

        feeds = calibration_feeds(model, self.samples, self.tokens)
        if len(feeds) < 2:
            return self._nothing(model, "too few samples to hold some back")
        try:
            twin = TunedTwin(model, _targets(model), codes="straight" if self.code_rate > 0 else "fixed")
            return self._tuned(model, twin, feeds, progress)
        except BadModel as error:
            if not self.optional:
                raise
            return self._nothing(model, str(error))

    def _tuned(self, model: Model, twin: TunedTwin, feeds: Sequence[Feed], progress: Progress) -> PassReport:
        """Learn, and keep what is better on the samples held back."""
        if not twin.parameters():
            return self._nothing(model, "nothing is quantized")
        lesson = Lesson(model, feeds)
        before = lesson.judge(twin)
        self._learn(twin, lesson, before, progress)
        after = lesson.judge(twin)
        better = bool(after < before)
        if better:
            twin.commit(model)
        metrics = {"held_back_loss_before": before, "held_back_loss_after": after, "kept": better}
        changed = len(twin.weights) + len(twin.grids) if better else 0
        return PassReport(self.registered_name(), changed, metrics=metrics)

    def _learn(self, twin: TunedTwin, lesson: Lesson, before: float, progress: Progress) -> None:
        from qcompiler.passes.round.descent import Descent

        rates = {"range": self.range_rate, "scale": self.scale_rate, "code": self.code_rate, "bias": self.bias_rate}
        descent = Descent(twin, rates, averages=_DECAY)
        lesson.learn(
            twin, descent, epochs=self.epochs, batch=self.batch, seed=self.seed, settings=repr(self),
            progress=progress, label="Tuning", patience=self.patience, before=before,
        )  # fmt: skip

    def _nothing(self, model: Model, reason: str) -> PassReport:
        return PassReport(self.registered_name(), 0, (Refusal(model.name, reason),))


def _targets(model: Model) -> list[Target]:
    """The values that have a range, as they were chosen."""
    products = {node for site in find_sites(model.ir) for node in site.users if node.op_type != "Gather"}
    return [t for t in choose_values(model.graph, products, outputs=True) if str(t.value.name) in model.ranges]
