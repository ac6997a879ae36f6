"""Orthogonal matrices of residual streams as parameters, on top of what the streams are turned by already.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.graph.folds import Stream
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
    """

    kind = "turn"

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._matrices = [torch.nn.Parameter(torch.eye(stream.width)) for stream in streams]

    def parameters(self) -> list[torch.nn.Parameter]:
        """One [width, width] a stream."""
        return self._matrices

    def keeping_the_mean(self) -> list[torch.nn.Parameter]:
        """Those that must map ones to ones."""
        return [m for m, stream in zip(self._matrices, self._streams, strict=True) if stream.keeps_mean]

    def found(self) -> list[npt.NDArray[np.float64]]:
        """What `Stream.rotate` wants: the nearest matrices that are orthogonal in float64."""
        parts = [np.linalg.svd(matrix.detach().double().numpy()) for matrix in self._matrices]
        return [left @ right for left, _, right in parts]

    @torch.no_grad()
    def forget(self) -> None:
        """Nothing is turned again."""
        for matrix in self._matrices:
            matrix.copy_(torch.eye(len(matrix)))

    def shape(self, name: str, rank: int) -> tuple[int, ...]:  # noqa: ARG002
        """All numbers of a value are taken together."""
        return (1,) * rank

    def grid(self, target: Target, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> Grid:
        """A grid that is learned on its own."""
        return Grid(target, whole(target, low, high))

    def attach(self, twin: TransformedTwin) -> None:
        """Turn all constants of the streams, and what is looked up."""
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
