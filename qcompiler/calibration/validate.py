"""Do these arrays fit the model's inputs? The one validator for calibration, `run` and `eval`.

Arrays are named as the model's inputs. There are three layouts:

batched   every array has its input's rank; the first axis is the samples, the same number everywhere. A
          model with a fixed first dimension d gets batches of exactly d, the last one filled up by
          repeating its last sample.
stacked   every array has one axis more than its input: every entry along it is one call of the model. For
          models whose inputs share no batch axis (input [seq, 576] and state [1, 1, 128]).
single    the ranks fit but the first axes differ: all arrays together are one call.

A number given for an input without axes goes into every call, whatever the layout of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadData, BadModel

Array = npt.NDArray[Any]
Layout = Literal["batched", "stacked", "single"]
_CHUNK = 1 << 22  # elements looked at in one go


class Rows(Protocol):
    """What an array has to offer: numpy arrays, memory maps and folders of images do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples first."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""
        ...

    def __getitem__(self, key: slice, /) -> Any:
        """Rows as an array."""
        ...


@dataclass(frozen=True)
class Block:
    """Samples that can be batched with one another.

    Attributes:
        arrays: input name -> rows.
        count: number of samples.
        layout: see the module.
        step: rows in every batch if the model fixes that, else 0.
        dtypes: what the model's inputs want; rows are cast when they are served.
        shared: input name -> the number that every call gets.
    """

    arrays: Mapping[str, Rows]
    count: int
    layout: Layout
    step: int
    dtypes: Mapping[str, np.dtype[Any]]
    shared: Mapping[str, Array] = field(default_factory=dict[str, Array])

    def feeds(self, start: int, stop: int) -> dict[str, Array]:
        """Input name -> array for one call; for the stacked layout stop is start + 1.

        Raises:
            BadData: an integer does not fit the input's type.
        """
        whole = self.layout == "single"
        taken = {k: np.asarray(v[:] if whole else v[start:stop]) for k, v in self.arrays.items()}
        if self.layout == "stacked":
            taken = {k: v[0] for k, v in taken.items()}
        missing = self.step - (min(stop, self.count) - start) if self.step else 0
        if missing > 0:
            taken = {k: np.concatenate([v, np.repeat(v[-1:], missing, axis=0)]) for k, v in taken.items()}
        return {k: _cast(k, v, self.dtypes[k]) for k, v in (taken | dict(self.shared)).items()}


def feeds_check(model: ir.Model, arrays: Mapping[str, Rows], where: str = "data") -> Block:
    """Check arrays against a model's inputs.

    Args:
        model: any graph with typed inputs.
        arrays: input name -> array; layouts as described in the module.
        where: the source, for messages.

    Raises:
        BadData: unknown or missing names, wrong rank, shape or type, no samples, different numbers of
            samples, NaN, or numbers beyond the input's type; minus infinity beside anything but zeros (a mask).
    """
    inputs = {str(v.name): v for v in model.graph.inputs}
    known = ", ".join(f"{name} {shape_text(v)}" for name, v in inputs.items())
    for name in arrays:
        if name not in inputs:
            raise BadData(f"the model has no input '{name}'", where, f"its inputs are {known}")
    for name in inputs:
        if name not in arrays:
            raise BadData(f"input '{name}' is missing", where, f"the model's inputs are {known}")
    dtypes = {name: input_dtype(value) for name, value in inputs.items()}
    shared = {name: np.asarray(rows) for name, rows in arrays.items() if not rows.shape and dims(inputs[name]) == ()}
    for name, number in shared.items():
        _check_type(name, number.dtype, dtypes[name], where)
        _check_finite(name, np.atleast_1d(number), dtypes[name], where)
    arrays = {name: rows for name, rows in arrays.items() if name not in shared}
    layout = _layout(inputs, arrays, where)
    for name, rows in arrays.items():
        _check_shape(name, tuple(rows.shape)[layout == "stacked" :], inputs[name], layout, where)
        _check_type(name, rows.dtype, dtypes[name], where)
    count = 1 if layout == "single" else next(iter(arrays.values())).shape[0]
    step = _step({name: inputs[name] for name in arrays}) if layout == "batched" else 0
    if count < 1:
        raise BadData("holds no samples", where, "give at least one")
    for name, rows in arrays.items():
        _check_finite(name, rows, dtypes[name], where)
    return Block(arrays, count, layout, step, dtypes, shared)


def input_dtype(value: ir.Value) -> np.dtype[Any]:
    """The numpy type of a model's input."""
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        raise BadModel(f"input '{value.name}' has no numeric type")
    return np.dtype(value.dtype.numpy())


def shape_text(value: ir.Value) -> str:
    """A shape as messages show it: "[batch,3,224,224]"."""
    return "of unknown shape" if value.shape is None else "[" + ",".join(str(_dim(d) or d) for d in value.shape) + "]"


def dims(value: ir.Value) -> tuple[int | None, ...] | None:
    """The fixed dimensions of a value, None for those that may vary; None if even the rank is unknown."""
    return None if value.shape is None else tuple(_dim(d) for d in value.shape)


def _dim(dim: Any) -> int | None:
    return dim if isinstance(dim, int) and dim >= 0 else None


def _layout(inputs: Mapping[str, ir.Value], arrays: Mapping[str, Rows], where: str) -> Layout:
    if not arrays:
        return "single"
    extra: set[int] = set()
    for name, rows in arrays.items():
        shape, given = dims(inputs[name]), tuple(rows.shape)
        rank = len(given) if shape is None else len(shape)
        if len(given) - rank not in (0, 1) or not given:
            raise BadData(
                f"'{name}' has shape {list(given)}", where, f"the input is {shape_text(inputs[name])}, samples first"
            )
        if shape is not None:
            extra.add(len(given) - rank)
    if len(extra) > 1:
        raise BadData("some arrays have one axis more than their input, some do not", where, "stack all or none")
    counts = {name: rows.shape[0] for name, rows in arrays.items()}
    same = len(set(counts.values())) == 1
    if extra == {1}:
        if not same:
            raise BadData(f"the arrays hold different numbers of samples: {counts}", where)
        return "stacked"
    if same:
        return "batched"
    if all(_leading(inputs[name]) is None for name in arrays):
        raise BadData(f"the arrays hold different numbers of samples: {counts}", where)
    return "single"


def _leading(value: ir.Value) -> int | None:
    shape = dims(value)
    return shape[0] if shape else None


def _step(inputs: Mapping[str, ir.Value]) -> int:
    fixed = {d for v in inputs.values() if (d := _leading(v)) is not None}
    return max(fixed, default=0)


def _check_shape(name: str, given: tuple[int, ...], value: ir.Value, layout: Layout, where: str) -> None:
    shape = dims(value)
    if shape is None:
        return
    pairs = list(zip(given, shape, strict=True))[layout == "batched" :]
    if any(fixed is not None and got != fixed for got, fixed in pairs) or 0 in given[layout == "batched" :]:
        raise BadData(f"'{name}' has shape {list(given)}", where, f"the input is {shape_text(value)}")


def _check_type(name: str, given: np.dtype[Any], wanted: np.dtype[Any], where: str) -> None:
    """Numbers may become floats or integers of another width; floats do not become integers."""
    numeric = given.kind in "biuf" or given.name in ("bfloat16",)
    if not numeric or not (given == wanted or wanted.kind not in "biu" or given.kind in "biu"):
        raise BadData(f"'{name}' has type {given}", where, f"the input wants {wanted}")


def _check_finite(name: str, rows: Rows, wanted: np.dtype[Any], where: str) -> None:
    """No NaN, no infinity, also not after the cast; an input of zeros and minus infinity alone is an additive mask."""
    if rows.dtype.kind in "biu":
        return
    limit = float(ml_dtypes.finfo(rows.dtype).max)  # comparing with more than the rows' type can hold overflows
    limit = min(limit, float(ml_dtypes.finfo(wanted).max)) if wanted.kind not in "biu" else limit
    step = max(1, _CHUNK // max(1, int(np.prod(rows.shape[1:], dtype=np.int64))))
    masked, plain = -1, False  # the first sample with minus infinity; whether there are other numbers than zero
    for start in range(0, rows.shape[0], step):
        part = np.asarray(rows[start : start + step])
        low = part == -np.inf
        bad = ~((np.abs(part) <= limit) | low) | (part == np.inf)
        if bad.any():
            _refuse_sample(name, "NaN" if np.isnan(part).any() else "infinity", start + _first(bad), where)
        if masked < 0 and low.any():
            masked = start + _first(low)
        plain = plain or bool(((part != 0) & ~low).any())
        if masked >= 0 and plain:
            _refuse_sample(name, "infinity", masked, where)


def _first(found: npt.NDArray[np.bool_]) -> int:
    return int(np.argwhere(found)[0][0])


def _refuse_sample(name: str, what: str, sample: int, where: str) -> NoReturn:
    raise BadData(f"'{name}' holds {what}, first in sample {sample}", where, "remove or repair these samples")


def _cast(name: str, array: Array, dtype: np.dtype[Any]) -> Array:
    if array.dtype == dtype:
        return np.asarray(array, order="C")
    if dtype.kind in "iu" and array.size:
        bounds = np.iinfo(dtype)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise BadData(
                f"'{name}' holds integers that {dtype} cannot", fix=f"keep them in {bounds.min}..{bounds.max}"
            )
    return array.astype(dtype)
