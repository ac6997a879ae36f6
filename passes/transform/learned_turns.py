"""Orthogonal matrices of residual streams and of heads as parameters, on top of what these are turned by already.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.graph.folds import Fold, Stream
from qcompiler.graph.folds.blocks import places_of
from qcompiler.passes.round.learning_twin import Grid
from qcompiler.passes.round.quantized_values import Target
from qcompiler.passes.transform.learned_scales import whole
from qcompiler.passes.transform.transformed_twin import TransformedTwin


class LearnedTurns:
    """Streams of one graph whose gains are folded.

    Tables that are only looked up in are not turned at every step (they are the largest constants, and are rounded as
    they are): what is looked up is.

    Attributes:
        kind: "turn".

    Args:
        streams: as found.
        heads: folds of kind "rotate" whose constants nothing else uses.
    """

    kind = "turn"

    def __init__(self, streams: Sequence[Stream], heads: Sequence[Fold] = ()) -> None:
        self._streams, self._heads = streams, heads
        self._matrices = [torch.nn.Parameter(torch.eye(stream.width)) for stream in streams]
        self._of_heads = [[torch.nn.Parameter(torch.eye(block.shape[1])) for block in f.blocks] for f in heads]

    def parameters(self) -> list[torch.nn.Parameter]:
        """One [width, width] a stream, then one a block of each fold."""
        return [*self._matrices, *(matrix for matrices in self._of_heads for matrix in matrices)]

    def keeping_the_mean(self) -> list[torch.nn.Parameter]:
        """Those that must map ones to ones."""
        return [m for m, stream in zip(self._matrices, self._streams, strict=True) if stream.keeps_mean]

    def fold(self) -> None:
        """Turn the constants of the graph by what was learned."""
        for stream, matrix in zip(self._streams, self._matrices, strict=True):
            stream.rotate(_orthogonal(matrix))
        for fold, matrices in zip(self._heads, self._of_heads, strict=True):
            fold.rotate([_orthogonal(matrix) for matrix in matrices])

    @torch.no_grad()
    def forget(self) -> None:
        """Nothing is turned again."""
        for matrix in self.parameters():
            matrix.copy_(torch.eye(len(matrix)))

    def shape(self, name: str, rank: int) -> tuple[int, ...]:  # noqa: ARG002
        """All numbers of a value are taken together."""
        return (1,) * rank

    def grid(self, target: Target, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> Grid:
        """A grid that is learned on its own."""
        return Grid(target, whole(target, low, high))

    def attach(self, twin: TransformedTwin) -> None:
        """Turn all constants of the streams, and what is looked up; then those of the heads."""
        for matrix, stream in zip(self._matrices, self._streams, strict=True):
            turns = (*stream.writers, *stream.readers)
            for value in dict.fromkeys(turn.constant.value for turn in turns):
                own = [turn for turn in turns if turn.constant.value is value]
                if all(turn.node.op_type == "Gather" for turn in own):
                    for turn in own:
                        twin.insert(str(turn.node.outputs[0].name), _Turned(matrix))
                    continue
                for axis in dict.fromkeys(turn.axis for turn in own):
                    twin.change(str(value.name), lambda c, m=matrix, axis=axis: _turned(c, m, axis))
        for fold, matrices in zip(self._heads, self._of_heads, strict=True):
            for edit in fold.region.edits.values():
                axis, places = places_of(fold.region, fold.start, fold.blocks, edit)
                own = [(matrices[number], torch.from_numpy(here)) for number, here in places]
                twin.change(str(edit.constant.value.name), lambda c, own=own, axis=axis: _in_parts(c, own, axis))


def _orthogonal(matrix: torch.nn.Parameter) -> npt.NDArray[np.float64]:
    """The nearest matrix that is orthogonal in float64."""
    left, _, right = np.linalg.svd(matrix.detach().double().numpy())
    return left @ right


def _in_parts(
    constant: torch.Tensor, parts: Sequence[tuple[torch.nn.Parameter, torch.Tensor]], axis: int
) -> torch.Tensor:
    """Each part of an axis turned by its own matrix."""
    line = constant.movedim(axis, -1)
    for matrix, places in parts:
        line = line.index_copy(-1, places, line[..., places] @ matrix)
    return line.movedim(-1, axis)


def _turned(constant: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    return (constant.movedim(axis, -1) @ matrix).movedim(-1, axis)


class _Turned(torch.nn.Module):
    """x Q, for a matrix that belongs to somebody else."""

    def __init__(self, matrix: torch.nn.Parameter) -> None:
        super().__init__()
        self._matrix = (matrix,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the last axis."""
        return x @ self._matrix[0]
