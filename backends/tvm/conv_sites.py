"""Reading the geometry of a Conv node, and saying what the kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends.tvm.geometry import Geometry
from qcompiler.graph.functions import PackedWeight
from qcompiler.graph.sites import Site

FIXED_PADS = ("NOTSET", "VALID", "")  # values of auto_pad that don't depend on the input


@dataclass(frozen=True)
class Spatial:
    """The attributes of a convolution as ONNX has them; pads are begins, then ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]


def conv_problem(node: ir.Node, weight: PackedWeight) -> str | None:
    """Why the kernels cannot take this convolution, or None."""
    if len(weight.shape) not in (3, 4):
        return f"a convolution over {len(weight.shape) - 2} dimensions"
    if weight.layout != "conv":
        return "a weight that is not stored as a convolution's"
    if node.attributes.get_string("auto_pad", "NOTSET") not in FIXED_PADS:
        return "padding that depends on the size of the input (auto_pad)"
    return None


def geometry_of(node: ir.Node, weight: PackedWeight | Site) -> tuple[Geometry, Spatial]:
    """Geometry of the kernel (two-dimensional) and the node's own attributes."""
    kernel = weight.shape[2:]
    rank = len(kernel)
    ones, zeros = (1,) * rank, (0,) * (2 * rank)

    def read(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        found = node.attributes.get(name)
        return tuple(found.as_ints()) if found is not None else default

    spatial = Spatial(kernel, read("strides", ones), read("dilations", ones), read("pads", zeros))
    groups = node.attributes.get_int("group", 1)

    def both(values: tuple[int, ...], first: int) -> tuple[int, int]:
        return (values[0], values[1]) if rank == 2 else (first, values[0])

    geometry = Geometry(
        weight.shape[1] * groups, weight.rows, groups, both(kernel, 1), both(spatial.strides, 1),
        both(spatial.dilations, 1), both(spatial.pads[:rank], 0),
    )  # fmt: skip
    return geometry, spatial
