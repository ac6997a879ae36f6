"""Bias absorption: a layer gives the next one what its activations always exceed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import layer_inputs, require_float
from qcompiler.pipeline import LOSSY, Pass, PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Subtract from a channel behind a Relu what it is never below; biases before and behind make up for it.

    The range of activations shrinks by that, which helps formats with one scale for all channels. A channel counts only
    if it stays above 0 on all calibration data; on data where it does not, the function changes: hence not exact.
    Equalisation, which makes biases large, comes before.

    Source: Nagel et al., Data-Free Quantization (1906.04721), section 4.1.3; there the bound is three standard
    deviations of a batch norm below its mean, here it is measured.

    Attributes:
        margin: share of the smallest activation that is left, in [0, 1).
    """

    contract: ClassVar[Literal["exact", "lossy"]] = LOSSY
    margin: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise BadOption(f"a margin of {self.margin} is not at least 0 and below 1", "pass 'absorb-bias'")

    def requires(self, model: Model) -> None:
        """Float weights, calibration data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Shift every input of a layer that a Relu makes."""
        folds, refused = _behind_relu(model)
        axes = {fold.value.name or "": fold.axis for fold in folds}
        lowest = channel_statistics(model, list(axes), axes)
        channels: dict[str, int] = {}
        for fold in progress.track(folds, "absorbing biases"):
            name = fold.value.name or ""
            smallest = np.maximum(lowest[name].low, 0.0) * (1 - self.margin)
            shift = fold.tied(smallest, lambda group: float(group.min()), fixed=0.0)
            if shift.any():
                fold.shift(shift)
                channels[name] = int(np.count_nonzero(shift))
            else:
                refused.append(Refusal(name, "no channel stays above 0 on the calibration data"))
        metrics = {"channels": channels} if channels else {}
        return PassReport(self.registered_name(), len(channels), tuple(refused), metrics)


def _behind_relu(model: Model) -> tuple[list[Fold], list[Refusal]]:
    folds: list[Fold] = []
    refused: list[Refusal] = []
    for value, axis in layer_inputs(model).items():
        producer = value.producer()
        if producer is None or producer.op_type != "Relu":
            continue
        fold = find_fold(model.ir, value, "shift", axis=axis, loose=True)
        if isinstance(fold, Fold):
            folds.append(fold)
        else:
            refused.append(fold)
    return folds, refused
