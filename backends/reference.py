"""The one integer semantics: what every kernel of every backend is compared with, bit for bit.

Rounding is half to even (`numpy.rint`) wherever a float becomes a code, and half up in the fixed-point
rescale, where it is one addition and one shift in hardware. Codes saturate. Sums of products are int32 and
must fit: `accumulator_bits` is the exact bound. Sources: ONNX QuantizeLinear; Jacob et al., "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), section 2.2; Colbert
et al., "A2Q" (2023) for the bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import PerRowGroup, Promoted, QTensor
from qcompiler.formats.promoted import split_zero

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]
Int32s = npt.NDArray[np.int32]


def saturate(values: npt.NDArray[Any], dtype: npt.DTypeLike) -> Ints:
    """Clip to the range of an integer type."""
    info = np.iinfo(dtype)
    return np.clip(values, info.min, info.max).astype(dtype)


def quantize(x: Floats, scale: float, zero: int, dtype: npt.DTypeLike = np.uint8) -> Ints:
    """Static activation codes: saturate(rint(x / scale) + zero), computed in float32 as ONNX does."""
    return saturate(np.rint(x / np.float32(scale)) + np.float32(zero), dtype)


def dequantize(codes: Ints, scale: float, zero: int) -> Floats:
    """(code - zero) * scale, float32."""
    return (codes.astype(np.int32) - zero).astype(np.float32) * np.float32(scale)


def quantize_rows(x: Floats, limit: int = 127, clip: float = 1.0) -> tuple[npt.NDArray[np.int8], Floats]:
    """Dynamic activation codes: int8 [..., K] and scale float32 [..., 1] = clip * max|x| / limit; 1 where that is 0.

    Args:
        x: float32 [..., K].
        limit: the largest code, 2^(b-1) - 1 for b bits.
        clip: share of a row's largest magnitude that the largest code stands for.
    """
    reach = np.abs(x).max(axis=-1, keepdims=True)
    scale = (reach * np.float32(clip) / np.float32(limit)).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(x / scale), -limit, limit).astype(np.int8), scale


def matmul(a: Ints, w: Ints, a_zero: int = 0) -> Int32s:
    """Sum of (a - a_zero) * w: a [..., K], w [N, K] -> int32 [..., N]."""
    return _int32((a.astype(np.int64) - a_zero) @ w.astype(np.int64).T)


def conv(
    x: Ints,
    w: Ints,
    x_zero: int = 0,
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Int32s:
    """Sum of (x - x_zero) * w over a window: x [B, C, H, W], w [O, C/groups, h, w] -> int32 [B, O, H', W'].

    Padding means zeros of the real numbers, that is codes x_zero. `pads` is (top, left, bottom, right).
    """
    top, left, bottom, right = pads
    wide = np.pad(x.astype(np.int64) - x_zero, [(0, 0), (0, 0), (top, bottom), (left, right)])
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(wide, reach, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    split = windows.reshape(x.shape[0], groups, -1, *windows.shape[2:])
    kernels = w.astype(np.int64).reshape(groups, -1, *w.shape[1:])
    sums = np.einsum("bgchwij,gocij->bgohw", split, kernels)
    return _int32(sums.reshape(x.shape[0], -1, *sums.shape[3:]))


def group_sums(a: Ints, weight: QTensor) -> Int32s:
    """int32 [..., N, G]: for every group of columns the sum of a * (code - zero); a [..., K] symmetric codes."""
    if isinstance(weight.spec.granularity, PerRowGroup):
        raise ValueError(f"{weight.spec}: codes of groups of rows are scaled before they are summed up")
    rows, columns = weight.shape
    groups = weight.scale.shape[1]
    size = weight.spec.granularity.group_size(columns)
    middle: float = getattr(weight.spec.format, "middle", 0)
    zero = np.full_like(weight.scale, middle) if weight.zero is None else weight.zero
    if isinstance(weight.spec.format, Promoted):
        _, zero = split_zero(zero)
    zero = np.broadcast_to(zero, (rows, groups)).astype(np.int64)
    parts: list[Int32s] = []
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, columns))
        parts.append(matmul(a[..., part], weight.codes[:, part].astype(np.int64) - zero[:, g : g + 1]))
    return np.stack(parts, axis=-1)


def group_matmul(a: Ints, a_scale: Floats, weight: QTensor, bias: Floats | None = None) -> Floats:
    """Product of row-quantized activations and a group-quantized weight, float32 [..., N].

    Everything within a group is integer. The groups are then added in float32 from the first to the last,
    each as float32(sum) * scale, with no fused multiply-add; the row's scale and the bias come last.
    """
    sums = group_sums(a, weight)
    total = np.zeros(sums.shape[:-1], np.float32)
    for g in range(sums.shape[-1]):
        total = total + sums[..., g].astype(np.float32) * weight.scale[:, g]
    total = total * a_scale
    return total if bias is None else total + bias


def fixed_point(multiplier: npt.NDArray[np.floating] | float) -> tuple[Int32s, Int32s]:
    """(m0, n) with multiplier = m0 * 2^-(31 + n): m0 in [2^30, 2^31), n the extra right shift.

    Raises:
        ValueError: unless all multipliers are positive, finite and below 1.
    """
    m = np.asarray(multiplier, np.float64)
    if not np.all((m > 0) & (m < 1)):
        raise ValueError("a fixed-point multiplier must lie between 0 and 1")
    mantissa, exponent = np.frexp(m)  # m = mantissa * 2^exponent, mantissa in [0.5, 1)
    m0, n = np.rint(mantissa * 2.0**31).astype(np.int64), -exponent
    n = np.where(m0 == 1 << 31, n - 1, n)
    m0 = np.where(m0 == 1 << 31, 1 << 30, m0)
    return m0.astype(np.int32), n.astype(np.int32)


def rescale(sums: Ints, m0: Int32s | int, n: Int32s | int) -> Int32s:
    """round_half_up(sums * m0 * 2^-(31 + n)) in 64-bit integers."""
    product = sums.astype(np.int64) * np.asarray(m0, np.int64)
    shift = np.minimum(31 + np.asarray(n, np.int64), 63)  # beyond that everything is zero
    return ((product + (np.int64(1) << (shift - 1))) >> shift).astype(np.int32)


def requantize(sums: Ints, m0: Int32s | int, n: Int32s | int, zero: int, dtype: npt.DTypeLike = np.uint8) -> Ints:
    """Accumulators to codes of the next activation: saturate(rescale(sums) + zero)."""
    return saturate(rescale(sums, m0, n).astype(np.int64) + zero, dtype)


def quantize_bias(bias: Floats, scale: Floats | float) -> Int32s:
    """A bias as int32 on the accumulator's scale (activation scale * weight scale per channel)."""
    return saturate(np.rint(np.asarray(bias, np.float64) / np.asarray(scale, np.float64)), np.int32).astype(np.int32)


def accumulator_bits(w: Ints, low: int, high: int) -> int:
    """Signed bits that no sum of w [N, K] with activation codes in [low, high] can exceed."""
    wide = w.astype(np.int64)
    positive, negative = np.maximum(wide, 0).sum(axis=1), np.minimum(wide, 0).sum(axis=1)
    most = int(max((positive * high + negative * low).max(), 0))
    least = int(min((positive * low + negative * high).min(), 0))
    return max(most.bit_length(), (-least - 1).bit_length() if least else 0) + 1


def _int32(sums: npt.NDArray[np.int64]) -> Int32s:
    if sums.size and (sums.max() > np.iinfo(np.int32).max or sums.min() < np.iinfo(np.int32).min):
        raise OverflowError("a sum of products does not fit int32; split it into groups of columns")
    return sums.astype(np.int32)
