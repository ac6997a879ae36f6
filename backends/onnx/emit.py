"""Writing nodes and initializers into a graph in front of the node that will use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.formats.packing import pack
from qcompiler.graph import functions

MICROSOFT = "com.microsoft"


@dataclass
class Emitter:
    """Adds to `model` in front of `before`; names start with `prefix`.

    Everything that depends on constants only is computed by ONNX Runtime when a session is made, so the
    file holds the compact form and the kernels get the form that they want.
    """

    model: ir.Model
    before: ir.Node
    prefix: str
    count: int = 0

    def constant(self, array: npt.NDArray[Any], what: str) -> ir.Value:
        """A new initializer."""
        name = self._name(what)
        value = ir.val(name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
        self.model.graph.register_initializer(value)
        return value

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 vector: a shape, axes, indices."""
        return self.constant(np.asarray(numbers, np.int64), "ints")

    def node(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A new node with one output."""
        name = self._name(op.lower())
        output = ir.val(name)
        node = ir.node(op, inputs, attributes, domain=domain, name=f"{name}_node", outputs=[output])
        if domain:
            self.model.graph.opset_imports.setdefault(domain, 1)
        self.model.graph.insert_before(self.before, [node])
        return output

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast."""
        output = self.node("Cast", value, to=dtype.value)
        output.dtype = dtype
        return output

    def unpacked(self, codes: npt.NDArray[Any], bits: int) -> ir.Value:
        """uint8 codes of this shape from planes that take exactly `bits` bits a code."""
        opset = self.model.graph.opset_imports[""]
        functions.add_function(self.model, functions.unpack_function(bits, False, opset))
        planes = [self.constant(plane, f"codes{i}") for i, plane in enumerate(pack(codes.reshape(-1), bits))]
        name = functions.unpack_name(bits, False)
        return self.node(name, *planes, domain=functions.DOMAIN, shape=list(codes.shape))

    def _name(self, what: str) -> str:
        self.count += 1
        return f"{self.prefix}_{what}_{self.count}"


def replace_output(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    """`result` takes the place and the name of the node's output; the node is removed."""
    old = node.outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
