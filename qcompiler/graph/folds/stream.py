"""Orthogonal matrices on a residual stream: everything that writes it and everything that reads it turns along.

`x -> x Q` on every value of the stream changes nothing if writers W become W Q, readers become Q^T W, and what
lies between sees lengths only: RMS norms with equal gains. Source: QuaRot (2404.00456), section 3.

LayerNorm sees the mean over the channels too: it stays as it is if Q leaves the mean alone, that is if Q maps
the vector of ones to itself. Nothing has to be centred for that, and no norm replaced. Derived here; QuaRot and
SliceGPT (2401.15024) make RMS norms of them instead, which `center-norms` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption, PassRefused, Refusal
from qcompiler.graph.folds.fold import ORTHOGONAL, Fold, find_fold
from qcompiler.graph.folds.region import Constant, label, resolve
from qcompiler.graph.folds.rewrite import commit, read, turned


@dataclass(frozen=True, eq=False)
class Turn:
    """A constant that turns with the stream: along `axis` of the initializer, at one operand."""

    node: ir.Node
    index: int
    constant: Constant
    axis: int


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream that can be multiplied by an orthogonal matrix.

    Attributes:
        model: whose graph is changed.
        width: channels.
        values: all values that turn.
        writers: weights, tables and biases that write the stream.
        readers: weights that read it.
        gains: products with a gain inside the stream; they must be equal numbers before it can be turned.
        keeps_mean: operations that see the mean over the channels (LayerNorm): matrices must map ones to ones.
    """

    model: ir.Model
    width: int
    values: tuple[ir.Value, ...]
    writers: tuple[Turn, ...]
    readers: tuple[Turn, ...]
    gains: tuple[tuple[ir.Node, int], ...]
    keeps_mean: tuple[ir.Node, ...] = ()

    def fold_gains(self) -> list[Refusal]:
        """Move the gains of the norms into the weights that read them; if some cannot move, say why and move none."""
        uneven = [gain for gain in self.gains if np.ptp(self._gain(*gain)) > 0]
        refused = [found for node, index in uneven if isinstance(found := self._gain_fold(node, index), Refusal)]
        for node, index in () if refused else uneven:
            fold, gain = self._gain_fold(node, index), self._gain(node, index)
            assert isinstance(fold, Fold)  # a gain is in no other's way
            fold.scale(fold.tied(np.broadcast_to(gain, (fold.size,)), lambda group: float(group[0])))
        return refused

    def _gain_fold(self, node: ir.Node, index: int) -> Fold | Refusal:
        value = node.outputs[0]
        if np.any(self._gain(node, index) == 0):
            return Refusal(value.name or "?", f"{label(node)} has a gain of zero")
        return find_fold(self.model, value)

    def _gain(self, node: ir.Node, index: int) -> npt.NDArray[np.float64]:
        constant = _constant(node, index)
        return np.asarray(read(constant.value).reshape(-1) + constant.offset, np.float64)

    def rotate(self, Q: npt.ArrayLike) -> None:
        """Multiply every value of the stream by Q from the right.

        Args:
            Q: [width, width], orthogonal; its columns sum to one where `keeps_mean` names operations.

        Raises:
            BadOption: Q has another shape, isn't orthogonal, or changes means that are seen.
            PassRefused: a norm in the stream still has a gain; see `fold_gains`.
        """
        matrix = self._checked(Q)
        for node, index in self.gains:
            gain = self._gain(node, index)
            if np.ptp(gain) > 1e-6 * np.abs(gain).max():
                raise PassRefused(f"{label(node)} has a gain for each channel", fix="call fold_gains first")
        axes: dict[ir.Value, list[int]] = {}
        for turn in (*self.writers, *self.readers):
            own = axes.setdefault(turn.constant.value, [])
            if turn.axis not in own:  # several operands of one constant turn it once
                own.append(turn.axis)
        commit({value: turned(value, own, matrix) for value, own in axes.items()})

    def _checked(self, Q: npt.ArrayLike) -> npt.NDArray[np.float64]:
        matrix = np.asarray(Q, np.float64)
        if matrix.shape != (self.width, self.width):
            raise BadOption(f"the stream has {self.width} channels, the matrix is {matrix.shape}")
        if np.abs(matrix.T @ matrix - np.eye(self.width)).max() > ORTHOGONAL:
            raise BadOption("the matrix is not orthogonal")
        if self.keeps_mean and np.abs(matrix.sum(0) - 1).max() > ORTHOGONAL:
            fix = "give one that maps ones to ones (hadamard.mean_kept), or run center-norms before"
            raise BadOption(f"the matrix changes the mean, which {label(self.keeps_mean[0])} sees", fix=fix)
        return matrix


def _constant(node: ir.Node, index: int) -> Constant:
    value = node.inputs[index]
    constant = None if value is None else resolve(value)
    assert constant is not None
    return constant
