"""Convolutions, pools, norms, attention and resizing of ONNX as torch functions (see `torch_ops`)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it

Tensor = torch.Tensor


def ints(t: Tensor | None) -> list[int] | None:
    """The values of an integer tensor; None stays None."""
    return None if t is None else [int(v) for v in t.reshape(-1).tolist()]


def _pads(
    pads: list[int] | None,
    auto_pad: str,
    x: Tensor,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
) -> list[int]:
    """ONNX padding [begin..., end...] as torch.nn.functional.pad wants it (last axis first)."""
    n = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        begin, end = [], []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small = total // 2
            begin.append(small if auto_pad == "SAME_UPPER" else total - small)
            end.append(total - begin[-1])
        pads = begin + end
    pads = pads or [0] * (2 * n)
    return [p for axis in reversed(range(n)) for p in (pads[axis], pads[axis + n])]


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    group: int = 1,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    kernel_shape: Any = None,
) -> Tensor:
    """Conv."""
    n = w.ndim - 2
    strides, dilations = strides or [1] * n, dilations or [1] * n
    x = F.pad(x, _pads(pads, auto_pad, x, list(w.shape[2:]), strides, dilations))
    return (F.conv1d, F.conv2d, F.conv3d)[n - 1](x, w, b, tuple(strides), 0, tuple(dilations), group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    group: int = 1,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    output_padding: Any = None,
    kernel_shape: Any = None,
    auto_pad: str = "NOTSET",
) -> Tensor:
    """ConvTranspose."""
    n = w.ndim - 2
    pads = pads or [0] * (2 * n)
    if auto_pad not in ("NOTSET", "VALID"):
        raise ValueError(f"ConvTranspose with auto_pad={auto_pad}")
    call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    y = call(
        x,
        w,
        b,
        tuple(strides or [1] * n),
        0,
        tuple(output_padding or [0] * n),
        group,
        tuple(dilations or [1] * n),
    )
    cut = tuple(slice(pads[i], y.shape[2 + i] - pads[n + i]) for i in range(n))
    return y[(slice(None), slice(None), *cut)]


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Any,
    strides: Any = None,
    pads: Any = None,
    dilations: Any = None,
    ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
    storage_order: int = 0,
) -> Tensor:
    """MaxPool."""
    n = len(kernel_shape)
    strides, dilations = strides or [1] * n, dilations or [1] * n
    x = F.pad(x, _pads(pads, auto_pad, x, kernel_shape, strides, dilations), value=float("-inf"))
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
    return pool(x, tuple(kernel_shape), tuple(strides), 0, tuple(dilations), bool(ceil_mode))


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Any,
    strides: Any = None,
    pads: Any = None,
    dilations: Any = None,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:
    """AveragePool."""
    n = len(kernel_shape)
    strides = strides or [1] * n
    padding = _pads(pads, auto_pad, x, kernel_shape, strides, [1] * n)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    args = (tuple(kernel_shape), tuple(strides), 0, bool(ceil_mode))
    if count_include_pad or not any(padding):
        return pool(F.pad(x, padding), *args)
    ones = F.pad(torch.ones_like(x[:1, :1]), padding)
    return pool(F.pad(x, padding), *args) / pool(ones, *args)


def batch_norm(
    x: Tensor,
    g: Tensor,
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """BatchNormalization in inference."""
    return F.batch_norm(x, mean, var, g, b, False, momentum, epsilon)


def layer_norm(
    x: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """LayerNormalization."""
    return F.layer_norm(x, x.shape[axis % x.ndim :], g.expand(x.shape[axis % x.ndim :]), b, epsilon)


def rms_norm(x: Tensor, g: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """RMSNormalization."""
    over = list(range(axis % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon) * g


def instance_norm(x: Tensor, g: Tensor, b: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """InstanceNormalization."""
    return F.instance_norm(x, None, None, g, b, True, 0.1, epsilon)


def group_norm(
    x: Tensor, g: Tensor, b: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """GroupNormalization."""
    return F.group_norm(x, num_groups, g, b, epsilon)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    softmax_precision: int = 1,
    **unsupported: Any,
) -> Tensor:
    """Attention without cache, its first output; the mode is of another one, and the softmax is precise enough."""
    if unsupported or softcap:
        raise ValueError(f"Attention with {', '.join(unsupported) or 'softcap'}")
    flat = q.ndim == 3
    if flat:
        q, k, v = (
            t.unflatten(-1, (h, -1)).transpose(1, 2)
            for t, h in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    repeat = q.shape[1] // k.shape[1]
    y = F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(repeat, 1),
        v.repeat_interleave(repeat, 1),
        mask,
        0.0,
        bool(is_causal),
        scale=scale,
    )
    return y.transpose(1, 2).flatten(2) if flat else y


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """RotaryEmbedding."""
    flat = x.ndim == 3
    heads = x.unflatten(-1, (num_heads, -1)) if flat else x.transpose(1, 2)
    cos, sin = ((c if ids is None else c[ids]).unsqueeze(2) for c in (cos, sin))
    size = rotary_embedding_dim or heads.shape[-1]
    turn, rest = heads[..., :size], heads[..., size:]
    a, b = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    parts = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    y = torch.cat((turned, rest), -1)
    return y.flatten(2) if flat else y.transpose(1, 2)


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    **other: Any,
) -> Tensor:
    """Resize, nearest and linear."""
    target = (ints(sizes) or [])[2:] or [
        int(s * f) for s, f in zip(x.shape[2:], (scales.tolist() if scales is not None else [])[2:], strict=True)
    ]
    if mode == "nearest":
        index = [
            _nearest_index(n, m, coordinate_transformation_mode, nearest_mode)
            for n, m in zip(x.shape[2:], target, strict=True)
        ]
        for axis, picked in enumerate(index):
            x = x.index_select(axis + 2, picked)
        return x
    if mode != "linear" or coordinate_transformation_mode not in (
        "half_pixel",
        "align_corners",
        "pytorch_half_pixel",
    ):
        raise ValueError(f"Resize with mode={mode}, coordinate_transformation_mode={coordinate_transformation_mode}")
    kind = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, target, mode=kind, align_corners=coordinate_transformation_mode == "align_corners")


def _nearest_index(size: int, target: int, coordinates: str, rounding: str) -> Tensor:
    at = torch.arange(target, dtype=torch.float64)
    if coordinates == "asymmetric":
        at = at * size / target
    elif coordinates == "align_corners":
        at = at * (size - 1) / max(target - 1, 1)
    else:
        at = (at + 0.5) * size / target - 0.5
    snap = {"floor": torch.floor, "ceil": torch.ceil, "round_prefer_ceil": lambda v: torch.floor(v + 0.5)}
    return snap.get(rounding, lambda v: torch.ceil(v - 0.5))(at).clamp(0, size - 1).to(torch.int64)
