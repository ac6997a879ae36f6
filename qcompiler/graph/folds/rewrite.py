"""New numbers for constants: computed in float64, in parts, stored in the element types of the old ones, all or none.

A constant may be as large as the table of a vocabulary of 250,000: in float64 it would take gigabytes. So a change is
made part by part where it can be, what comes out goes to the scratch file, and pages of old numbers are let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.scratch import empty, forget, let_go

Floats = npt.NDArray[np.float64]
Part = tuple[Any, Floats]  # where it lies in the constant, its new numbers
Change = Floats | Callable[[], Iterable[Part]]
_PART = 1 << 22  # numbers that are changed at a time
_LARGE = 1 << 26  # bytes after which pages are let go


def read(value: ir.Value) -> Floats:
    """The numbers of an initializer."""
    return np.asarray(_raw(value), np.float64)


def scaled(value: ir.Value, steps: Sequence[tuple[float, Floats]]) -> Change:
    """A constant plus an offset times a factor, minus the offset: for each of `steps` in turn.

    Args:
        value: the constant.
        steps: offsets, and factors that broadcast to the constant.
    """

    def parts() -> Iterator[Part]:
        raw = _raw(value)
        wide = [(offset, np.broadcast_to(factor, raw.shape)) for offset, factor in steps]
        for index in _slices(raw.shape, 0):
            array = np.asarray(raw[index], np.float64)
            for offset, factor in wide:
                array = (array + offset) * factor[index] - offset
            yield index, array

    return parts


def turned(value: ir.Value, axes: Sequence[int], matrix: Floats) -> Change:
    """A constant of which every line along an axis is multiplied by a matrix from the right, for each of the axes."""

    def parts() -> Iterator[Part]:
        raw = _raw(value)
        others = [axis for axis in range(raw.ndim) if axis not in axes]
        along = max(others, key=lambda axis: raw.shape[axis], default=None)
        for index in [...] if along is None else _slices(raw.shape, along):
            array = np.asarray(raw[index], np.float64)
            for axis in axes:
                array = np.moveaxis(np.tensordot(array, matrix, ([axis], [0])), -1, axis)
            yield index, array

    return parts


def largest(value: ir.Value, offset: float, axes: tuple[int, ...]) -> Floats:
    """The largest |number + offset| along some axes of a constant, which are kept with length 1."""
    raw = _raw(value)
    if not raw.size:
        return np.abs(np.asarray(raw, np.float64))
    high, low = (np.asarray(end(axis=axes, keepdims=True), np.float64) for end in (raw.max, raw.min))
    return np.maximum(high + offset, -(low + offset))


def peak(value: ir.Value) -> float:
    """The largest magnitude of a constant over its root mean square: what a common grid has to span; 0 of zeros."""
    raw = _raw(value)
    reach = float(largest(value, 0.0, tuple(range(raw.ndim))).max(initial=0))
    squares = sum(float(np.square(raw[index], dtype=np.float64).sum()) for index in _slices(raw.shape, 0))
    return reach / (squares / raw.size) ** 0.5 if squares else 0.0


def commit(changes: Mapping[ir.Value, Change]) -> None:
    """Store new numbers.

    Raises:
        PassRefused: one of them overflows its element type; nothing is stored.
    """
    tensors = {value: _made(value, change) for value, change in changes.items()}
    for value, tensor in tensors.items():
        value.const_value = tensor


def _made(value: ir.Value, change: Change) -> ir.TensorProtocol:
    old = value.const_value
    assert old is not None
    if isinstance(change, np.ndarray):
        shape, parts = change.shape, ((index, change[index]) for index in _slices(change.shape, 0))
    else:
        shape, parts = tuple(old.shape.numpy()), change()
    new = empty(shape, old.dtype.numpy())
    for index, part in parts:
        with np.errstate(over="ignore"):
            new[index] = part.astype(new.dtype)
        if not np.all(np.isfinite(np.asarray(new[index], np.float64)) | ~np.isfinite(part)):
            raise PassRefused(f"the transformed weight overflows {old.dtype.name}", value.name or "")
    if new.nbytes >= _LARGE:
        let_go([old])
        forget()
    return ir.tensor(new, name=value.name)


def _slices(shape: tuple[int, ...], axis: int) -> Iterator[Any]:
    """Indices of parts along an axis that make up an array of this shape."""
    if not shape:
        yield ...
        return
    step = max(1, _PART // max(1, prod(shape) // max(shape[axis], 1)))
    for first in range(0, shape[axis], step):
        yield (*(slice(None) for _ in range(axis)), slice(first, first + step))


def _raw(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()
