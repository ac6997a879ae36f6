"""What a site multiplies its weights with: its data input as rows, for Gram matrices and means.

A product y = W x of a site has blocks: the groups of a convolution, the matrices of a batched MatMul, else one.
`input_rows` gives x for all of them as [rows, blocks, columns], in the order of the columns of
`Site.to_matrix`, so that the output of block b is rows[:, b] @ W[b].T.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.sites import Site

Array = npt.NDArray[Any]


def block_count(site: Site) -> int:
    """How many independent products the site has."""
    if site.layout == "columns-first":
        return prod(site.shape[:-2])
    return site.groups


def input_rows(
    site: Site, x: Array, limit: int, rng: np.random.Generator, user: ir.Node | None = None
) -> npt.NDArray[np.float32]:
    """Rows of the site's data input.

    Args:
        site: a MatMul, Gemm, Conv or ConvTranspose.
        x: an array of the value that `user` reads.
        limit: at most this many rows; more are thinned out at random (positions of a convolution).
        rng: chooses them.
        user: which of the site's users; `site.node` if None.

    Returns:
        float32 [rows, blocks, columns].
    """
    if site.layout.startswith("conv"):
        return _patches(site, user or site.node, np.asarray(x, np.float32), limit, rng)
    blocks = block_count(site)
    if blocks == 1:
        rows = x.reshape(-1, 1, site.columns)
    else:
        batch = site.shape[:-2]
        wide = np.broadcast_to(x, np.broadcast_shapes(x.shape[:-2], batch) + x.shape[-2:])
        rows = wide.reshape(-1, blocks, *x.shape[-2:]).swapaxes(1, 2).reshape(-1, blocks, site.columns)
    if len(rows) > limit:
        rows = rows[np.sort(rng.choice(len(rows), limit, replace=False))]
    return np.asarray(rows, np.float32)


def _patches(site: Site, node: ir.Node, x: Array, limit: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """The receptive fields of (some) output positions: [samples * positions, groups, channels / group * kernel]."""
    kernel = site.shape[2:]
    dilations = _ints(node, "dilations", [1] * len(kernel))
    strides = _ints(node, "strides", [1] * len(kernel))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if site.layout == "conv":
        x = np.pad(x, [(0, 0), (0, 0), *_pads(node, x.shape[2:], reach, strides)])
        steps = strides
    else:  # a transposed convolution is a plain one over the input with zeros put between its elements
        x = np.pad(_stretched(x, strides), [(0, 0), (0, 0), *((r - 1, r - 1) for r in reach)])
        steps = [1] * len(kernel)
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axes)
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in steps))]
    windows = windows[(..., *(slice(None, None, d) for d in dilations))]
    if site.layout != "conv":
        windows = np.flip(windows, tuple(range(-len(kernel), 0)))
    spatial = windows.shape[2 : 2 + len(kernel)]
    total = prod(spatial)
    chosen = np.arange(total)
    if len(x) * total > limit:
        chosen = np.sort(rng.choice(total, max(1, limit // len(x)), replace=False))
    where = np.unravel_index(chosen, spatial)
    picked = windows[(slice(None), slice(None), *where)]  # [samples, channels, positions, *kernel]
    moved = np.moveaxis(picked, 2, 1)
    return np.ascontiguousarray(moved, np.float32).reshape(len(x) * len(chosen), site.groups, site.columns)


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else list(attribute.as_ints())


def _pads(node: ir.Node, size: tuple[int, ...], reach: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis of a convolution."""
    attribute = node.attributes.get("auto_pad")
    mode = "NOTSET" if attribute is None else attribute.as_string()
    if mode == "VALID":
        return [(0, 0)] * len(size)
    if mode == "NOTSET":
        pads = _ints(node, "pads", [0] * (2 * len(size)))
        return list(zip(pads[: len(size)], pads[len(size) :], strict=True))
    result: list[tuple[int, int]] = []
    for n, r, s in zip(size, reach, strides, strict=True):
        total = max((-(-n // s) - 1) * s + r - n, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return result


def _stretched(x: Array, strides: list[int]) -> Array:
    spatial = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    wide = np.zeros((*x.shape[:2], *spatial), x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return wide
