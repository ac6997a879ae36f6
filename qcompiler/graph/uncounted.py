"""The weights that no plan can quantize and no average of bits counts, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.sites import BRANCH, FLOATS, skipped_weights

# Operators of ONNX that multiply by a weight and make no site, with the inputs that it may be; None: any.
_MULTIPLY: dict[str, tuple[int, ...] | None] = {
    "Einsum": None,
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "DeformConv": (1,),
}


@dataclass(frozen=True)
class Uncounted(Refusal):
    """A weight that stays float outside the average of bits per weight.

    Attributes:
        bytes: that it stores.
    """

    bytes: int


def uncounted_weights(model: ir.Model) -> list[Uncounted]:
    """All weights that are no sites.

    They are: what `skipped_weights` names; constants with two axes or more that operators read which multiply by
    them in a way of their own, or of which only their domain knows what they do; such constants in the subgraphs of
    If, Loop and Scan.
    """
    initializers = model.graph.initializers
    found = {r.where: Uncounted(r.where, r.reason, _bytes(initializers[r.where])) for r in skipped_weights(model)}
    for name, value in initializers.items():
        reader = next((label for use in value.uses() if (label := _multiplier(*use))), None)
        if name not in found and BRANCH not in value.metadata_props and _is_matrix(value) and reader:
            found[name] = Uncounted(name, f"it is used by {reader}", _bytes(value))
    within = [Uncounted(str(v.name), "it lies in a subgraph", _bytes(v)) for v in _of_subgraphs(model)]
    return [*found.values(), *within]


def _of_subgraphs(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (g for g in model.graphs() if g is not model.graph):
        yield from filter(_is_matrix, graph.initializers.values())


def _multiplier(node: ir.Node, index: int) -> str:
    """The operator, if it multiplies by what it reads at this input, or ""."""
    inputs = _MULTIPLY.get(node.op_type, ()) if node.domain == "" else None
    if inputs is not None and index not in inputs:
        return ""
    domain = f" of {node.domain}" if node.domain else ""
    return f"{node.op_type}{domain} '{node.name or node.outputs[0].name}'"


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype in FLOATS and len(tensor.shape) > 1 and tensor.size > 1


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
