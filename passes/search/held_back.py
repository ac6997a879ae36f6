"""Judging a rounded model by calibration samples on which nothing was fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler import registry
from qcompiler.evaluate.classes import kinds_of_outputs
from qcompiler.measure.loss import Kind, output_loss
from qcompiler.measure.memory import spill
from qcompiler.measure.runner import Runner
from qcompiler.measure.stream import calibration_of
from qcompiler.model import Model
from qcompiler.progress import Progress, Silent
from qcompiler.scratch import spilled

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
_LEAST = 4  # samples, to hold one back
_SHARE = 8  # one sample of so many is held back
_MOST_SAMPLES = 32
_MOST_BYTES = 1 << 29  # of the float model's outputs, which wait in the scratch file
_RUN_BYTES = 1 << 25  # of outputs of one run


class HeldBack:
    """The loss of models that are rounded and not yet lowered, on the last eighth of the calibration data.

    Args:
        model: float, with as much calibration data as `of` asks for.

    Attributes:
        fit: the samples that a trial may be fitted on.
        samples: that are judged by.
    """

    def __init__(self, model: Model) -> None:
        data = calibration_of(model)
        held = min(_MOST_SAMPLES, max(1, data.count // _SHARE))
        self.fit = data.take(data.count - held)
        original, judges = Runner(model.ir), data.part(data.count - held, data.count)
        size = sum(array.nbytes for array in original(next(iter(judges.batches(1, 1)))).values())
        step, self.samples = max(1, _RUN_BYTES // max(size, 1)), 0
        self._truth: list[tuple[Feeds, dict[str, Array]]] = []
        for feeds in judges.batches(step, max(1, _MOST_BYTES // max(size, 1))):
            self._truth.append((feeds, {name: spilled(array) for name, array in original(feeds).items()}))
            self.samples += _rows(feeds)
        self._kinds: dict[str, Kind] = kinds_of_outputs(*self._truth[0])

    @classmethod
    def of(cls, model: Model, progress: Progress, asking: str) -> HeldBack | None:
        """A judge, or None, which the user is told, where there are fewer than 4 samples: too few to spare one.

        Args:
            model: float, with calibration data.
            progress: where the user is told.
            asking: which pass.
        """
        count = calibration_of(model).count
        if count >= _LEAST:
            return cls(model)
        progress.note(
            f"{asking}: too little data to try anything on ({count} to fit on and judge by); give 6 samples or more"
        )
        return None

    def loss(self, model: Model) -> float:
        """Mean KL divergence of class scores in nats, or normalised squared error; infinite where no number comes out.

        Args:
            model: with a plan and codes; those of its sites that have none count as float.
        """
        lowered = model.clone()
        planned = {name: plan for name, plan in model.plan.sites.items() if name in model.weights}
        lowered.plan = replace(model.plan, sites=planned)
        registry.find("passes", "insert-qdq")().run(lowered, Silent())
        spill(lowered, model)
        runner, total = Runner(lowered.ir), 0.0
        for feeds, truth in self._truth:
            with np.errstate(all="ignore"):
                total += output_loss(truth, runner(feeds), self._kinds) * _rows(feeds)
        return total / self.samples if np.isfinite(total) else float("inf")


def _rows(feeds: Feeds) -> int:
    return next((len(array) for array in feeds.values() if array.ndim), 1)
