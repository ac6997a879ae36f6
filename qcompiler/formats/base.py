"""The interface of a number format, and what a quantized matrix is.

A format is a grid of representable numbers with the arithmetic of its storage. Rounding, allocation, QDQ
and kernels are written against this interface, so a new format is one file and every method can use it.
All weights are seen as matrices [rows, columns] (see `granularity`); `qcompiler.graph.sites` holds the
mapping from and to the tensors of a graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption
from qcompiler.formats.granularity import Granularity, PerRowGroup, parse_granularity

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
_PART = 1 << 20
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
SCALE_DTYPES: dict[str, tuple[str, int]] = {  # name -> (short name, bits)
    "float32": ("fp32", 32),
    "float16": ("fp16", 16),
    "bfloat16": ("bf16", 16),
}
_SCALE_LIMITS = {
    "float32": (2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "float16": (2.0**-24, 65504.0),
    "bfloat16": (2.0**-126, (2 - 2.0**-7) * 2.0**127),
}


def round_scale(scale: npt.NDArray[Any], dtype: str) -> Floats:
    """Round scales to the dtype in which they are stored, as float32; never to zero, never to infinity.

    Subnormal float16 is used: a row of weights below 0.008 has an 8-bit scale below float16's normal range.
    """
    wide = np.clip(np.asarray(scale, np.float32), *_SCALE_LIMITS[dtype])
    if dtype == "float32":
        return wide
    target: Any = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    return wide.astype(target).astype(np.float32)


@runtime_checkable
class Format(Protocol):
    """A grid of numbers. Frozen and hashable; `str(f)` is its name and `parse_format` the inverse."""

    @property
    def bits(self) -> int:
        """Stored bits of one code."""
        ...

    @property
    def onnx_type(self) -> str | None:
        """Name of the ONNX tensor type that holds the codes ("INT4"), or None if ONNX has none."""
        ...

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        ...

    @property
    def free_scales(self) -> bool:
        """Whether every scale may be any number: else only `formats.fit` sets them."""
        ...

    def check(self, granularity: Granularity, symmetric: bool) -> None:
        """Raise BadOption for a spec that this format cannot be part of."""
        ...

    def fit(self, low: Floats, high: Floats, symmetric: bool) -> tuple[Floats, Floats | None]:
        """Scale and zero point that cover [low, high] (any shape); zero is None if symmetric."""
        ...

    def encode(self, w: Floats, scale: Floats, zero: Floats | None) -> Codes:
        """Nearest codes of `w`, saturated; scale and zero broadcast against w."""
        ...

    def decode(self, codes: Codes, scale: Floats, zero: Floats | None) -> Floats:
        """The numbers that the codes stand for, float32."""
        ...

    def with_bits(self, bits: int) -> Format:
        """The same kind of format with another width."""
        ...

    def storage(self, rows: int, columns: int, granularity: Granularity, symmetric: bool) -> tuple[int, int]:
        """Stored bits of the codes of a [rows, columns] matrix, and of what goes with them beside the scales."""
        ...

    def scale_bits(self, scale_rows: int, groups: int, each: int) -> int:
        """Stored bits of scales [scale rows, groups], of which a float takes `each`."""
        ...


@dataclass(frozen=True)
class QuantSpec:
    """How one weight is stored: format, granularity, symmetric or with zero points, dtype of the scales.

    `str(spec)` is like "uint4-asym-g32-fp16" or "int8-sym-channel-fp32"; `parse_spec` is the inverse.
    """

    format: Format
    granularity: Granularity
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_DTYPES:
            fix = f"use one of {', '.join(SCALE_DTYPES)}"
            raise BadOption(f"unknown scale dtype '{self.scale_dtype}'", fix=fix)
        self.format.check(self.granularity, self.symmetric)

    @property
    def bits(self) -> int:
        """Stored bits of one code, scales not counted."""
        return self.format.bits

    def stored_bits(self, rows: int, columns: int) -> int:
        """Exact stored bits of a [rows, columns] matrix: packed codes, scales and packed zero points or flags."""
        rest = sum(self.format.storage(rows, columns, self.granularity, self.symmetric))
        return self.scale_bits(rows, columns) + rest

    def scale_bits(self, rows: int, columns: int) -> int:
        """Stored bits of the scales of a [rows, columns] matrix."""
        return self.format.scale_bits(*self.granularity.grid(rows, columns), SCALE_DTYPES[self.scale_dtype][1])

    def with_bits(self, bits: int) -> QuantSpec:
        """The same spec with another width."""
        return replace(self, format=self.format.with_bits(bits))

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        return f"{self.format}-{kind}-{self.granularity}-{SCALE_DTYPES[self.scale_dtype][0]}"


@dataclass
class QTensor:
    """A quantized matrix.

    Attributes:
        spec: how it is stored.
        codes: integers [rows, columns], int8 or uint8 up to 8 bits.
        scale: float32 [scale rows, groups], already rounded to `spec.scale_dtype`.
        zero: integer-valued float32 [scale rows, groups], or None if symmetric. Of `Promoted` formats
            flags are in it (`promoted.split_zero`).
    """

    spec: QuantSpec
    codes: npt.NDArray[Any]
    scale: Floats
    zero: Floats | None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The matrix that the codes stand for, float32 [rows, columns].

        Args:
            out: an array of that shape to write it to, of any type of floats.
        """
        matrix = np.empty(self.shape, np.float32) if out is None else out
        for rows in row_parts(self.shape):
            scale, zero = spread_rows(self.scale, self.zero, self.spec, rows, self.shape[1])
            matrix[rows] = self.spec.format.decode(self.codes[rows], scale, zero)
        return matrix

    @property
    def stored_bits(self) -> int:
        """Exact stored bits, scales and zero points counted."""
        return self.spec.stored_bits(*self.shape)


def row_parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a matrix in parts of about a million elements: temporaries of an embedding table would be large."""
    step = max(1, _PART // max(shape[1], 1))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def spread_rows(
    scale: Floats, zero: Floats | None, spec: QuantSpec, rows: slice, columns: int
) -> tuple[Floats, Floats | None]:
    """`spread` scales and zeros for some rows."""

    def part(values: Floats) -> Floats:
        if isinstance(spec.granularity, PerRowGroup):
            return values[np.arange(rows.start, rows.stop) // spec.granularity.size]
        return spread(values if values.shape[0] == 1 else values[rows], spec, columns)

    return part(scale), None if zero is None else part(zero)


def spread(per_group: Floats, spec: QuantSpec, columns: int, rows: int | None = None) -> Floats:
    """Repeat [scale rows, groups] within the groups: [scale rows, columns], or broadcastable [.., 1].

    Of groups of rows it is [rows, columns]; then `rows` is needed.
    """
    if isinstance(spec.granularity, PerRowGroup):
        if rows is None:
            raise ValueError(f"{spec} has groups of rows: say how many rows there are")
        return np.repeat(per_group, spec.granularity.size, axis=0)[:rows]
    if per_group.shape[1] == 1:
        return per_group
    return np.repeat(per_group, spec.granularity.group_size(columns), axis=1)[:, :columns]


def parse_format(text: str) -> Format:
    """The inverse of `str(format)`: "int4", "uint3", or any name a registered format claims.

    A format that takes numbers is registered under its name with # for each of them but the last: "int", "int#to#p".
    """
    from qcompiler import registry

    known, form = registry.names("formats"), _NUMBER.sub("#", text)
    if form.endswith("#") and form[:-1] in known:
        numbers = _NUMBER.findall(text)
        return registry.find("formats", form[:-1])(*(int(n) if n.isdigit() else float(n) for n in numbers))
    if text in known:
        made: Callable[..., Format] = registry.find("formats", text)
        if all(argument.default is not argument.empty for argument in signature(made).parameters.values()):
            return made()
    raise BadOption(f"unknown format '{text}'", fix="write int2 ... int8, uint2 ... uint8 or int4to8p10")


def parse_spec(text: str) -> QuantSpec:
    """The inverse of `str(spec)`; short forms are completed: "int4" is "int4-sym-channel-fp16"."""
    parts = text.split("-")
    fmt = parse_format(parts[0])
    symmetric = not parts[0].startswith("uint")
    granularity: Granularity = parse_granularity("channel")
    dtype = "float16"
    short = {name: full for full, (name, _) in SCALE_DTYPES.items()}
    for part in parts[1:]:
        if part in ("sym", "asym"):
            symmetric = part == "sym"
        elif part in short:
            dtype = short[part]
        else:
            granularity = parse_granularity(part)
    return QuantSpec(fmt, granularity, symmetric, dtype)
