"""`fx_twin`: an ONNX graph as a differentiable `torch.fx.GraphModule`.

Whatever needs gradients (Fisher information, AdaRound, learned transforms) runs on the twin; forward-only work
runs on ONNX Runtime, which is faster. The twin's outputs equal ONNX Runtime's up to float summation order. Needs
the extra `torch`.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.errors import BadModel, MissingExtra

if TYPE_CHECKING:
    import torch.fx


def fx_twin(model: ir.Model) -> torch.fx.GraphModule:
    """Interpret a float ONNX model as a torch module.

    Args:
        model: without subgraphs; model-local functions are inlined into a copy.

    Returns:
        A GraphModule that takes the graph's inputs in order and returns a tuple of its outputs. Float
        initializers with two or more axes are parameters named after the initializer, all else buffers.
        `node.meta["onnx"]` is the name of the ONNX node that an fx node stands for, `node.meta["value"]` that of
        the value it makes.

    Raises:
        MissingExtra: torch is not installed.
        BadModel: an operator has no torch form here.
    """
    try:
        import torch
        import torch.fx
    except ImportError as error:
        raise MissingExtra("torch", "the differentiable twin of a model") from error
    from qcompiler.measure.torch_ops import OPS

    model = model.clone()
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    root, graph = torch.nn.Module(), torch.fx.Graph()
    values: dict[ir.Value, torch.fx.Node] = {}
    for value in model.graph.inputs:
        if value.const_value is None:
            values[value] = graph.placeholder(_identifier(value.name, "input"))
    for value in model.graph.initializers.values():
        values[value] = graph.get_attr(_store(root, value, torch))
    for node in model.graph:
        call = OPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if call is None:
            kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise BadModel(f"operator {kind} has no differentiable form", node.name or "", "use a forward-only method")
        arguments = tuple(None if v is None else values[v] for v in node.inputs)
        made = graph.call_function(call, arguments, _attributes(node))
        made.meta["onnx"] = node.name
        if len(node.outputs) == 1 and node.op_type not in ("Split", "TopK"):
            values[node.outputs[0]] = made
        else:
            for i, output in enumerate(node.outputs):
                values[output] = graph.call_function(operator.getitem, (made, i))
    for value, made in values.items():
        made.meta["value"] = value.name
    graph.output(tuple(values[v] for v in model.graph.outputs))
    return torch.fx.GraphModule(root, graph)


_LISTS = (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS)


def _identifier(name: str | None, fallback: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name or fallback)
    return cleaned if cleaned[:1].isalpha() else f"v_{cleaned}"


def _store(root: Any, value: ir.Value, torch: Any) -> str:
    """Put an initializer on the module; the same name for the same initializer, made unique."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    name = _identifier(value.name, "weight")
    while hasattr(root, name):
        name += "_"
    tensor = torch.from_numpy(np.array(array))
    if tensor.is_floating_point() and tensor.ndim > 1:
        root.register_parameter(name, torch.nn.Parameter(tensor))
    else:
        root.register_buffer(name, tensor)
    return name


def _attributes(node: ir.Node) -> dict[str, Any]:
    found: dict[str, Any] = {"outputs": len(node.outputs)} if node.op_type == "Split" else {}
    for name, attribute in node.attributes.items():
        value: Any = attribute.value
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise BadModel(
                f"operator {node.op_type} holds a subgraph, which has no differentiable form", node.name or ""
            )
        if attribute.type == ir.AttributeType.TENSOR:
            value = (int(attribute.value.dtype), attribute.value.numpy().reshape(-1).tolist())
        found[name] = list(value) if attribute.type in _LISTS else value  # type: ignore[reportUnknownArgumentType]
    return found
