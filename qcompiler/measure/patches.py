"""The rows that a site's weight matrix is multiplied with, for every kind of operation (im2col and its like).

With X = site_inputs(site, activation) of shape [groups, T, columns] and W the weight matrix whose rows are split
evenly among the groups, the operation (without bias) computes X[g] @ W[g].T for its T output positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view

from qcompiler.graph.sites import Site

Array = npt.NDArray[Any]


def site_inputs(site: Site, activation: Array, rows: int | None = None, user: ir.Node | None = None) -> Array:
    """Rows that multiply the site's weight matrix.

    Args:
        site: any but Gather, which multiplies nothing.
        activation: the data input of the operation, as the graph has it.
        rows: at most this many of the T rows, evenly spread; all if None.
        user: which of the site's users reads this activation; `site.node` if None.

    Returns:
        float32 [groups, T, columns]; groups of a convolution, or the number of matrices that a MatMul weight
        of rank 3 and more stacks.

    Raises:
        ValueError: the site's operation has no such rows.
    """
    node = site.node if user is None else user
    activation = np.asarray(activation, np.float32)
    if node.op_type in ("Conv", "ConvTranspose"):
        return _patches(site, node, activation, rows)
    if node.op_type not in ("MatMul", "Gemm"):
        raise ValueError(f"{node.op_type} multiplies nothing with its weight")
    stacked = prod(site.shape[:-2])
    if stacked > 1:
        batch = np.broadcast_shapes(activation.shape[:-2], site.shape[:-2])
        wide = np.broadcast_to(activation, (*batch, *activation.shape[-2:]))
        lead = len(batch) - len(site.shape[:-2])
        order = (*range(lead, len(batch)), *range(lead), len(batch), len(batch) + 1)
        flat = wide.transpose(order).reshape(stacked, -1, site.columns)
    else:
        flat = activation.reshape(1, -1, site.columns)
    return flat if rows is None else flat[:, _spread(flat.shape[1], rows)]


def _spread(total: int, rows: int) -> npt.NDArray[np.int64]:
    """Evenly spread positions among `total`, at most `rows`."""
    return np.unique(np.linspace(0, total - 1, min(rows, total)).astype(np.int64)) if total else np.arange(0)


def _patches(site: Site, node: ir.Node, x: Array, rows: int | None) -> Array:
    kernel = site.shape[2:]
    rank = len(kernel)
    dilations = _ints(node, "dilations", (1,) * rank)
    strides = _ints(node, "strides", (1,) * rank)
    if node.op_type == "Conv":
        pads = _conv_pads(node, x.shape[2:], kernel, strides, dilations)
    else:
        x, pads = _spaced(node, x, kernel, strides, dilations)
        strides = (1,) * rank
    x = _padded(x, pads)
    windows = _windows(x, kernel, strides, dilations)  # [batch, channels, *positions, *kernel]
    if node.op_type == "ConvTranspose":  # it scatters where a convolution gathers: the kernel is mirrored
        windows = windows[(..., *(slice(None, None, -1),) * rank)]
    places = (windows.shape[0], *windows.shape[2 : 2 + rank])
    chosen = _spread(prod(places), prod(places) if rows is None else rows)
    sample, *position = np.unravel_index(chosen, places)
    taken = np.moveaxis(windows, 1, rank + 1)[(sample, *position)]  # [T, channels, *kernel]
    return np.ascontiguousarray(taken.reshape(len(chosen), site.groups, -1).transpose(1, 0, 2))


def _windows(x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """Views [batch, channels, *positions, *kernel], nothing copied."""
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, x.ndim))
    views = sliding_window_view(x, reach, axes)  # type: ignore[call-overload]
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    return views[(slice(None), slice(None), *steps)]


def _padded(x: Array, pads: Sequence[tuple[int, int]]) -> Array:
    """Zeros around the spatial axes; negative pads crop."""
    x = np.pad(x, [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in pads)])
    ends = (slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pads, x.shape[2:], strict=True))
    return x[(slice(None), slice(None), *ends)]


def _conv_pads(
    node: ir.Node,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    mode = _text(node, "auto_pad")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        return [(t // 2, t - t // 2) if mode == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]
    if mode == "VALID":
        return [(0, 0)] * len(kernel)
    return _pads(node, len(kernel))


def _spaced(
    node: ir.Node, x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[Array, list[tuple[int, int]]]:
    """A transposed convolution as one of stride 1: zeros between the pixels, and the pads that go with it."""
    rank = len(kernel)
    extra = _ints(node, "output_padding", (0,) * rank)
    pads = _pads(node, rank)
    mode = _text(node, "auto_pad")
    shape: tuple[int, ...] = _ints(node, "output_shape", ())[-rank:]
    full = [
        s * (n - 1) + e + (k - 1) * d + 1
        for n, k, s, d, e in zip(x.shape[2:], kernel, strides, dilations, extra, strict=True)
    ]
    if not shape and mode in ("SAME_UPPER", "SAME_LOWER"):
        shape = tuple(n * s for n, s in zip(x.shape[2:], strides, strict=True))
    if shape:
        totals = [max(f - n, 0) for f, n in zip(full, shape, strict=True)]
        pads = [(t // 2, t - t // 2) if mode == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]
    wide = np.zeros((*x.shape[:2], *(s * (n - 1) + 1 for n, s in zip(x.shape[2:], strides, strict=True))), x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    outer = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    return wide, [(o - a, o - b + e) for o, (a, b), e in zip(outer, pads, extra, strict=True)]


def _pads(node: ir.Node, rank: int) -> list[tuple[int, int]]:
    flat = _ints(node, "pads", (0,) * (2 * rank))
    return list(zip(flat[:rank], flat[rank:], strict=True))


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def _text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "NOTSET" if attribute is None else attribute.as_string()
