"""Names for the dimensions that a model leaves open without one: TVM takes all of those for one and the same."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.calibration import Calibration


def name_dimensions(model: ir.Model, data: Calibration | None) -> None:
    """Name the unnamed dimensions of the inputs, in place.

    Two of one input are never the same. Those of two inputs are where they are on one axis and of one size in the
    data: a batch or the length of a text, which products and sums of both inputs need to be equal.

    Args:
        model: its inputs have shapes.
        data: of the model's inputs; without any, all dimensions on one axis are the same.
    """
    feeds = {} if data is None else next(data.batches(2, 2))
    for value in model.graph.inputs:
        if value.shape is not None:
            array = feeds.get(str(value.name))
            sizes = [""] * len(value.shape) if array is None else [f"_{size}" for size in array.shape]
            value.shape = ir.Shape(
                f"unnamed{axis}{size}" if _is_unnamed(dim) else dim
                for axis, (dim, size) in enumerate(zip(value.shape, sizes, strict=True))
            )


def _is_unnamed(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and not dim.value
