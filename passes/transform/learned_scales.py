"""The scales of folds as parameters: one logarithm for the channels that are tied.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.graph.folds import Fold
from qcompiler.graph.folds.labels import Labels
from qcompiler.model import StaticRange
from qcompiler.passes.round.learning_twin import Grid
from qcompiler.passes.round.quantized_values import Target
from qcompiler.passes.transform.transformed_twin import TransformedTwin

Floats = npt.NDArray[np.float64]
_LARGEST = float(np.log(100.0))  # MobileQuant keeps scales above 0.01


@dataclass(frozen=True, eq=False)
class _Term:
    """What one fold adds to the logarithms of a tensor's factors: sign times the numbers at `places`."""

    fold: int
    places: torch.Tensor
    sign: int


class LearnedScales:
    """Folds of one graph, none of them applied.

    Attributes:
        kind: "scale".
        folds: as given.

    Args:
        folds: of kind "scale".
    """

    kind = "scale"

    def __init__(self, folds: Sequence[Fold]) -> None:
        self.folds = folds
        self._logs = [torch.nn.Parameter(torch.zeros(max(int(fold.ties.max()) + 1, 1))) for fold in folds]

    def parameters(self) -> list[torch.nn.Parameter]:
        """One [ties] a fold."""
        return self._logs

    @torch.no_grad()
    def forget(self) -> None:
        """All scales are 1 again."""
        for logs in self._logs:
            logs.zero_()

    def found(self) -> list[Floats]:
        """[channels] a fold: what `Fold.scale` wants."""
        held = [self._held(number).detach().double().exp().numpy() for number in range(len(self.folds))]
        return [logs[fold.ties] for logs, fold in zip(held, self.folds, strict=True)]

    def attach(self, twin: TransformedTwin) -> None:
        """Scale all constants of the folds; one that others read too is scaled for its own operand only."""
        terms: dict[tuple[str, tuple[str, int] | None], tuple[float, list[_Term]]] = {}
        for number, fold in enumerate(self.folds):
            for edit in fold.region.edits.values():
                at = (str(edit.node.outputs[0].name), edit.index) if edit.constant.shared else None
                key = (str(edit.constant.value.name), at)
                own = terms.setdefault(key, (edit.constant.offset, []))[1]
                own.append(self._term(number, edit.labels, -edit.sign))
        for (name, at), (offset, own) in terms.items():
            change = lambda c, offset=offset, own=own: (c + offset) * self.factors(own) - offset  # noqa: E731
            twin.change(name, change, at)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The axes along which a value's factors differ, with their lengths; 1 for the others."""
        marks = [mark for fold in self.folds for value, mark in fold.region.marks.items() if value.name == name]
        return np.broadcast_shapes((1,) * rank, *(mark.labels.shape for mark in marks))

    def grid(self, target: Target, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> Grid:
        """A grid whose ends go with the scales; `low` and `high` in the shape that `shape` says."""
        terms = [
            self._term(number, fold.region.marks[target.value].labels, -fold.region.marks[target.value].sign)
            for number, fold in enumerate(self.folds)
            if target.value in fold.region.marks
        ]
        return _ScaledGrid(target, low, high, self, terms) if terms else Grid(target, whole(target, low, high))

    def factors(self, terms: Sequence[_Term]) -> torch.Tensor:
        """What a tensor of these terms is multiplied by, broadcastable to it."""
        total = torch.zeros(())
        for term in terms:
            total = total + term.sign * self._held(term.fold)[term.places]
        return total.exp()

    def _held(self, number: int) -> torch.Tensor:
        """The logarithms within their bounds, and a zero at the end, where the place -1 finds it."""
        return torch.cat([self._logs[number].clamp(-_LARGEST, _LARGEST), torch.zeros(1)])

    def _term(self, number: int, labels: Labels, sign: int) -> _Term:
        return _Term(number, torch.from_numpy(self.folds[number].places(labels)), sign)


def whole(target: Target, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> StaticRange:
    """The range of all channels together."""
    return target.grid(float(low.min(initial=0)), float(high.max(initial=0)))


class _ScaledGrid(Grid):
    """A grid that spans what the channels span after they are scaled."""

    def __init__(
        self,
        target: Target,
        low: npt.NDArray[np.float32],
        high: npt.NDArray[np.float32],
        scales: LearnedScales,
        terms: Sequence[_Term],
    ) -> None:
        super().__init__(target, whole(target, low, high))
        self._low, self._high = torch.from_numpy(low), torch.from_numpy(high)
        self._factors = lambda: scales.factors(terms)

    def base(self) -> torch.Tensor:
        """[2]: the ends of the channel that reaches farthest."""
        factors = self._factors()
        return torch.stack([(self._low * factors).amin().clamp(max=0), (self._high * factors).amax().clamp(min=0)])
