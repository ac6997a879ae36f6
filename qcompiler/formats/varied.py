"""Formats behind a transform: how a weight is stored, and what changes it before and after that.

A transform T of a layer that leaves its float function as it is changes what rounding does: the weight that takes part
in the function is T^-1 Q(T W), the *effective* weight. Everything that measures only needs that matrix, so a transform
that may be had or not is one more format. What a file stores is always the plain format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from qcompiler.formats.base import Floats, QTensor, QuantSpec
from qcompiler.formats.fit import quantize

Undo = Callable[[Floats], Floats]


class Effect(Protocol):
    """What a transform does to the weight of one site."""

    def change(self, matrix: Floats, spec: QuantSpec) -> tuple[Floats, Undo]:
        """What is rounded in place of a float32 matrix [rows, columns], and what makes the effective weight of that.

        The second takes the rounded matrix; for the unrounded one it gives `matrix` back, up to float32.
        """
        ...

    def extra_bits(self, rows: int, columns: int) -> int:
        """What is stored beside the codes, in bits."""
        ...


@dataclass(frozen=True)
class VariedSpec(QuantSpec):
    """A format behind a transform. Its text says all that decides the effective weight of a given site of a model.

    Attributes:
        variant: name of the transform.
        token: tells its settings apart; empty where the model and its data decide them.
        effect: the transform of the site's weight.
    """

    variant: str = ""
    token: str = ""
    effect: Effect | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(spec: QuantSpec, variant: str, token: str, effect: Effect) -> VariedSpec:
        """`spec` behind a transform."""
        return VariedSpec(spec.format, spec.granularity, spec.symmetric, spec.scale_dtype, variant, token, effect)

    def stored_bits(self, rows: int, columns: int) -> int:
        """Exact stored bits: those of the plain format, and what the transform stores."""
        extra = 0 if self.effect is None else self.effect.extra_bits(rows, columns)
        return super().stored_bits(rows, columns) + extra

    def __str__(self) -> str:
        return f"{plain(self)}+{self.variant}{self.token and ':'}{self.token}"


def plain(spec: QuantSpec) -> QuantSpec:
    """The format in which the codes are stored."""
    if not isinstance(spec, VariedSpec):
        return spec
    return QuantSpec(spec.format, spec.granularity, spec.symmetric, spec.scale_dtype)


@dataclass
class Effective:
    """A rounded matrix, and what makes the effective weight of it."""

    tensor: QTensor
    undo: Undo | None

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales."""
        return self.tensor.codes.nbytes + self.tensor.scale.nbytes

    def decode(self, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The effective weight, float32 [rows, columns], or written to `out` as `QTensor.decode` does it."""
        if self.undo is None:
            return self.tensor.decode(out)
        matrix = self.undo(self.tensor.decode())
        if out is None:
            return matrix
        out[...] = matrix
        return out


def effective(matrix: Floats, spec: QuantSpec) -> Effective:
    """A whole matrix [rows, columns] to nearest in a format, clipped for the smallest squared error."""
    if not isinstance(spec, VariedSpec) or spec.effect is None:
        return Effective(quantize(matrix, spec, "mse"), None)
    changed, undo = spec.effect.change(matrix, plain(spec))
    return Effective(quantize(changed, plain(spec), "mse"), undo)
