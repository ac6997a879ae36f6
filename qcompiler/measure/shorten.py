"""Shorter texts for models whose outputs are large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

Feeds = Mapping[str, npt.NDArray[Any]]


def shortened(model: ir.Model, feeds: Feeds, length: int | None) -> Feeds:
    """The first positions of a text.

    Args:
        model: whose inputs say what is a text: all are integers with two axes, and the second one has a length that
            the model leaves open, the same for all. Everything else is returned as it is: half an image is another
            image.
        feeds: one batch.
        length: positions to keep at most; all if None.
    """
    if length is None:
        return dict(feeds)
    shapes = {value.name: value.shape for value in model.graph.inputs if value.name in feeds}
    lengths = {None if shape is None or len(shape) != 2 else _free_length(shape[1]) for shape in shapes.values()}
    text = all(feeds[name].dtype.kind in "iub" for name in shapes if name is not None)
    if not text or len(lengths) != 1 or None in lengths:
        return dict(feeds)
    return {name: array[:, :length] for name, array in feeds.items()}


def _free_length(axis: int | ir.SymbolicDim) -> str | None:
    """The name of a length that the model leaves open."""
    return axis.value if isinstance(axis, ir.SymbolicDim) else None
