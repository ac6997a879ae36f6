"""Bit operations: multiply-accumulates times the bits of both factors (HAWQ-V3, methods.md A4).

The convention: one sample; products of weights only (MatMul, Gemm, Conv, ConvTranspose; looking rows up is none);
weights count the bits of a code (the average of two widths), scales and zero points not counted; quantized activations
count the bits of their codes; a float factor counts the bits of its type, 32 for float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import onnx_ir as ir

from qcompiler.formats import Promoted
from qcompiler.graph.sites import Site
from qcompiler.plan import SitePlan

Shapes = Mapping[str, tuple[int, ...]]
_FLOAT = 32  # bits of an activation


def site_macs(site: Site, shapes: Shapes) -> int:
    """Multiply-accumulates of all operations that use a site's weight.

    Args:
        site: whose.
        shapes: of what its operations read and write in one run, by the names of the values.
    """
    return sum(_macs(site, node, shapes) for node in site.users)


def site_bops(site: Site, plan: SitePlan | None, macs: int) -> int:
    """Bit operations of a site under a plan; None: as it is, in float."""
    tensor = site.weight.const_value
    assert tensor is not None
    rounded = None if plan is None or plan.activation == "float" else plan.activation_bits
    spec = None if plan is None else plan.weight
    weight = tensor.dtype.bitwidth if spec is None else spec.bits
    if spec is not None and isinstance(spec.format, Promoted):
        weight = spec.format.average_bits
    return round(macs * weight) * (rounded or _activation_bits(site))


def _activation_bits(site: Site) -> int:
    dtype = None if site.activation is None else site.activation.dtype
    return _FLOAT if dtype is None else dtype.bitwidth


def _macs(site: Site, node: ir.Node, shapes: Shapes) -> int:
    if node.op_type == "Gather":
        return 0
    if node.op_type == "ConvTranspose":  # every input meets the weights of its channel
        data = node.inputs[0]
        assert data is not None
        return prod(shapes[str(data.name)]) * prod(site.shape[1:])
    return prod(shapes[str(node.outputs[0].name)]) * site.columns
