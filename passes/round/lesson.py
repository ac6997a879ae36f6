"""End-to-end learning: a twin's outputs are brought back to those of the float model (knowledge distillation).

Only passes that learn use this file; it needs torch when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.measure.loss import Kind
from qcompiler.model import Model
from qcompiler.passes.round.teacher import Teacher
from qcompiler.progress import Progress

if TYPE_CHECKING:
    import torch

    from qcompiler.passes.round.descent import Descent, Learner

Feed = dict[str, npt.NDArray[Any]]
_WARM = 5  # steps in which the rates rise


class Lesson:
    """Samples to learn from, samples to judge by (the last eighth), and what the float model makes of them.

    Attributes:
        learned, judged: indices of the samples.

    Args:
        model: its graph is float, and is not edited while this is in use.
        feeds: samples, two or more.
        kind: what all float outputs are taken for; None: what each looks like (`measure.loss`).
    """

    def __init__(self, model: Model, feeds: Sequence[Feed], kind: Kind | None = None) -> None:
        self._model, self._feeds = model, feeds
        self._kinds: list[Kind | None] = [kind] * len(model.graph.outputs)
        self._teacher = Teacher(model, feeds)
        held = max(1, len(feeds) // 8)
        self.learned, self.judged = range(len(feeds) - held), range(len(feeds) - held, len(feeds))

    def judge(self, twin: Learner, samples: Sequence[int] | None = None) -> float:
        """Mean loss of some samples, those held back if None."""
        import torch

        chosen = self.judged if samples is None else samples
        with torch.no_grad(), twin.step():
            return float(np.mean([self._loss(twin, sample).item() for sample in chosen]))

    def learn(
        self,
        twin: Learner,
        descent: Descent,
        *,
        epochs: int,
        batch: int,
        seed: int,
        settings: str,
        progress: Progress,
        label: str,
        patience: int = 0,
        before: float = np.inf,
    ) -> None:
        """Descend, the rates rising in a few steps and then falling to zero; a killed run goes on where it was.

        Args:
            twin: that `descent` changes.
            descent: with its rates.
            epochs: passes over the samples to learn from.
            batch: samples a step.
            seed: of their order.
            settings: all that the result depends on besides the model's graph, data, codes and ranges.
            progress: shows the steps under `label`.
            label: see there.
            patience: after so many epochs it ends if the loss on samples held back has not fallen below `before`, nor
                that of the mean over the last of these epochs; 0: never.
            before: that loss at the beginning.
        """
        from qcompiler.passes.round.patience import Patience
        from qcompiler.passes.round.training_state import TrainingState

        if descent.optimizer is None:
            return
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(self.learned) for _ in range(epochs)])
        steps = np.array_split(order, -(-len(order) // batch))
        epoch = -(-len(steps) // epochs)
        watched = range((patience - 1) * epoch + 1, patience * epoch + 1) if 0 < patience < epochs else range(0)
        waiting = Patience(descent.optimizer, watched, lambda: self.judge(twin), before) if watched else None
        state = TrainingState(self._model, descent.optimizer, settings)
        done = state.load()
        for number, step in enumerate(progress.track(steps[done:], label), done + 1):
            share = min(1.0, number / _WARM) * (1 - (number - 1) / len(steps))
            if not descent.step(lambda sample: self._loss(twin, sample), step.tolist(), share):
                return
            idle = waiting is not None and waiting.is_over(number)
            if number % epoch == 0 or number == len(steps):
                state.save(len(steps) if idle else number)
            if idle:
                progress.note(f"{label}: stopped, the loss on held-back samples does not fall")
                return

    def _loss(self, twin: Learner, sample: int) -> torch.Tensor:
        from qcompiler.passes.round.distance import distance

        return distance(twin.outputs(self._feeds[sample]), self._teacher[sample], self._kinds)
