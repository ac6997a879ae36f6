"""Tune: learn activation ranges, scales and biases so that the outputs come back to those of the float model.

Ranges that are chosen one by one, and codes that are rounded layer by layer, leave errors that add up. All
scales together are a few numbers a channel; gradient descent on the error of the model's own output (knowledge
distillation, no labels) finds better ones in a few passes over the calibration data, and there are too few of them
to learn the data by heart. The codes of the weights stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import MissingExtra, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.measure.loss import output_kind
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.round.quantized_values import Target, choose_values
from qcompiler.pipeline import Pass, PassReport, Refusal
from qcompiler.progress import Progress

if TYPE_CHECKING:
    import torch

    from qcompiler.passes.round.tuned_twin import TunedTwin

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Pair = tuple[Feed, list[Array]]
_STEP = 8  # samples from all over the data that one step looks at


@dataclass(frozen=True)
class Tune(Pass):
    """Learn `model.ranges`, `model.bias_shift` and the scales of `model.weights` (Adam, cosine schedule).

    The last fifth of the data is held back: if the outputs of these samples don't come closer, nothing is changed.

    Attributes:
        epochs: passes over the data.
        samples: of the calibration data, at most.
        range_rate: of learning the ends of a grid, in shares of its span.
        scale_rate: of learning the scales of weights, relative to them; 0 leaves them alone.
        bias_rate: of learning biases, in units of the outputs of the layers.
        optional: change nothing and say so, instead of an error, where torch is not installed.
        seed: of the order of the data.
    """

    epochs: int = 3
    samples: int = 256
    range_rate: float = 1e-3
    scale_rate: float = 3e-4
    bias_rate: float = 3e-4
    optional: bool = False
    seed: int = 0

    def requires(self, model: Model) -> None:
        """Refuse a model that is lowered, not rounded, or without data; say what to install."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if not model.weights and not model.ranges:
            raise PassRefused("nothing is quantized yet", where=model.name, fix="run it after a rounding pass")
        if model.calibration is None:
            raise PassRefused("tuning needs calibration data", where=model.name)
        if not self.optional and importlib.util.find_spec("torch") is None:
            raise MissingExtra("torch", "tuning of scales and biases")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Learn; metrics hold the loss on held-back samples before and after."""
        if importlib.util.find_spec("torch") is None:
            progress.note("tune: scales and biases stay as they are; pip install 'qcompiler[torch]' to learn them")
            return PassReport(self.registered_name(), 0, (Refusal(model.name, "torch is not installed"),))
        from qcompiler.passes.round.tuned_twin import TunedTwin

        pairs = self._pairs(model)
        held = max(1, len(pairs) // 5)
        if len(pairs) < 2:
            return PassReport(self.registered_name(), 0, (Refusal(model.name, "too few samples to hold some back"),))
        train, judges = pairs[:-held], pairs[-held:]
        twin = TunedTwin(model, _targets(model))
        names = [str(v.name) for v in model.graph.inputs]
        before = _judge(twin, judges, names)
        self._learn(twin, train, names, progress)
        after = _judge(twin, judges, names)
        better = bool(after < before)
        if better:
            twin.commit(model)
        metrics = {"held_back_loss_before": before, "held_back_loss_after": after, "kept": better}
        return PassReport(self.registered_name(), len(twin.grids) + len(twin.shifts) if better else 0, metrics=metrics)

    def _pairs(self, model: Model) -> list[Pair]:
        """Samples and what the float model makes of them."""
        assert model.calibration is not None
        run = Runner(model.ir)
        feeds = [dict(feed) for feed in model.calibration.spread(self.samples).batches(1)]
        return [(feed, list(run(feed).values())) for feed in feeds]

    def _learn(self, twin: TunedTwin, train: Sequence[Pair], names: Sequence[str], progress: Progress) -> None:
        import torch

        rates = [
            (self.range_rate, [grid.ends for grid in dict.fromkeys(twin.grids.values())]),
            (self.scale_rate, [factor.value for factor in twin.factors.values()]),
            (self.bias_rate, [shift.value for shift in twin.shifts.values()]),
        ]
        rates = [(rate, found) for rate, found in rates if rate and found]
        for _, found in rates:
            for parameter in found:
                parameter.requires_grad_(requires_grad=True)
        adam = torch.optim.Adam([{"params": found, "lr": rate} for rate, found in rates])
        rng = np.random.default_rng(self.seed)
        order = np.concatenate([rng.permutation(len(train)) for _ in range(self.epochs)])
        steps = np.array_split(order, -(-len(order) // _STEP))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(steps))
        for step in progress.track(steps, "Tuning scales and biases"):
            adam.zero_grad()
            for feed, wanted in (train[int(index)] for index in step):
                loss = _loss(twin.outputs(feed, names), wanted) / len(step)
                loss.backward()
            adam.step()
            schedule.step()


def _targets(model: Model) -> list[Target]:
    """The values that have a range, as they were chosen."""
    products = {node for site in find_sites(model.ir) for node in site.users if node.op_type != "Gather"}
    return [t for t in choose_values(model.graph, products, outputs=True) if str(t.value.name) in model.ranges]


def _judge(twin: TunedTwin, judges: Sequence[Pair], names: Sequence[str]) -> float:
    import torch

    with torch.no_grad():
        return float(np.mean([_loss(twin.outputs(feed, names), wanted).item() for feed, wanted in judges]))


def _loss(outputs: Sequence[torch.Tensor], wanted: Sequence[Array]) -> torch.Tensor:
    """Squared error relative to the power of each output; for class scores also a share of the KL divergence."""
    import torch

    total = torch.zeros(())
    for output, exact in zip(outputs, wanted, strict=True):
        if not np.issubdtype(exact.dtype, np.floating):
            continue
        goal = torch.from_numpy(exact)
        total = total + (output - goal).square().sum() / goal.square().sum().clamp(min=1e-30)
        if output_kind(exact) == "logits":
            p, q = torch.log_softmax(goal, -1), torch.log_softmax(output, -1)
            total = total + 0.2 * (p.exp() * (p - q)).sum(-1).mean()
    return total
