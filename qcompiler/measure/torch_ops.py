"""ONNX operators (opset 18 to 26) as torch functions: inputs by position, attributes by keyword.

Only this file and capture/torch.py know torch; it is imported when a twin is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it

from qcompiler.measure import torch_nn_ops as nn
from qcompiler.measure.torch_nn_ops import ints

Tensor = torch.Tensor
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return y if c is None else y + beta * c


def _reduce(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        over = ints(axes)
        if not over:
            if noop_with_empty_axes:
                return x
            over = list(range(x.ndim))
        return call(x, over, bool(keepdims))

    return run


def _prod(x: Tensor, over: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in over), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if select_last_index:
            return x.shape[axis] - 1 - call(x.flip(axis), axis, bool(keepdims))
        return call(x, axis, bool(keepdims))

    return run


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if s == 0 and not allowzero else s for i, s in enumerate(ints(shape) or [])]
    return x.reshape(sizes)


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[: axis % (x.ndim + 1)]), -1)


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes) or ()))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    found = ints(axes) or []
    for axis in sorted(a % (x.ndim + len(found)) for a in found):
        x = x.unsqueeze(axis)
    return x


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape) or ())))


def _split(
    x: Tensor, split: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> tuple[Tensor, ...]:
    if split is not None:
        return torch.split(x, ints(split) or [], axis)
    return torch.split(x, math.ceil(x.shape[axis] / (num_outputs or outputs)), axis)


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    first, last = ints(starts) or [], ints(ends) or []
    along = ints(axes) or list(range(len(first)))
    for begin, end, axis, step in zip(first, last, along, ints(steps) or [1] * len(first), strict=True):
        picked = range(
            *slice(begin, end, step).indices(x.shape[axis]) if step > 0 else _backward(begin, end, step, x.shape[axis])
        )
        x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
    return x


def _backward(begin: int, end: int, step: int, size: int) -> tuple[int, int, int]:
    return slice(begin, None if end < -size else end, step).indices(size)


def _gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def _gather_nd(x: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        lead = math.prod(x.shape[:batch_dims])
        flat = zip(
            x.reshape(lead, *x.shape[batch_dims:]),
            index.reshape(lead, *index.shape[batch_dims:]),
            strict=True,
        )
        found = torch.stack([_gather_nd(a, i) for a, i in flat])
        return found.reshape(*x.shape[:batch_dims], *found.shape[1:])
    return x[tuple(index.movedim(-1, 0))]


def _scatter_nd(x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction not in ("none", "add"):
        raise ValueError(f"ScatterND with reduction={reduction}")
    return x.index_put(tuple(index.movedim(-1, 0)), updates, accumulate=reduction == "add")


def _pad(
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    amounts, along = ints(pads) or [], ints(axes) or list(range(x.ndim))
    full = [0] * (2 * x.ndim)
    for i, axis in enumerate(along):
        full[2 * (x.ndim - 1 - axis % x.ndim)], full[2 * (x.ndim - 1 - axis % x.ndim) + 1] = (
            amounts[i],
            amounts[len(along) + i],
        )
    if mode == "constant":
        return F.pad(x, full, value=0.0 if value is None else value.item())
    while len(full) > 2 and not any(full[-2:]):
        full = full[:-2]
    return F.pad(x, full, mode={"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode])


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(_DTYPES[to])


def _constant_of_shape(shape: Tensor, *, value: Any = None) -> Tensor:
    dtype, fill = value or (1, [0.0])
    return torch.full(ints(shape) or [], fill[0], dtype=_DTYPES[dtype])


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, 0 if k is None else int(k.item()))


def _top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    found = torch.topk(x, int(k.item()), axis, bool(largest), bool(sorted))
    return found.values, found.indices


OPS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Attention": nn.attention,
    "AveragePool": nn.average_pool,
    "BatchNormalization": nn.batch_norm,
    "Cast": _cast,
    "CastLike": lambda x, y, **_: x.to(y.dtype),
    "Ceil": torch.ceil,
    "Clip": _clip,
    "Concat": lambda *x, axis: torch.cat(x, axis),
    "ConstantOfShape": _constant_of_shape,
    "Conv": nn.conv,
    "ConvTranspose": nn.conv_transpose,
    "Cos": torch.cos,
    "Div": _div,
    "Dropout": lambda x, *_, **__: x,
    "Einsum": lambda *x, equation: torch.einsum(equation, *x),
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": torch.floor,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(list(range(2, x.ndim)), keepdim=True),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "GroupNormalization": nn.group_norm,
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "InstanceNormalization": nn.instance_norm,
    "IsNaN": torch.isnan,
    "LayerNormalization": nn.layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "LogSoftmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "MatMul": torch.matmul,
    "Max": lambda *x: reduce(torch.maximum, x),
    "MaxPool": nn.max_pool,
    "Min": lambda *x: reduce(torch.minimum, x),
    "Mod": _mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": lambda x, s: torch.where(x < 0, x * s, x),
    "Pad": _pad,
    "Pow": torch.pow,
    "RMSNormalization": nn.rms_norm,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceL1": _reduce(lambda x, a, k: x.abs().sum(a, k)),
    "ReduceL2": _reduce(lambda x, a, k: x.square().sum(a, k).sqrt()),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, a, k: x.square().sum(a, k)),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": nn.resize,
    "RotaryEmbedding": nn.rotary,
    "Round": torch.round,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: F.softmax(x, axis),
    "Softplus": F.softplus,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Sum": lambda *x: reduce(torch.add, x),
    "Tanh": torch.tanh,
    "Tile": lambda x, r: x.tile(tuple(ints(r) or ())),
    "TopK": _top_k,
    "Transpose": lambda x, perm=None: x.permute(perm or list(range(x.ndim))[::-1]),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
