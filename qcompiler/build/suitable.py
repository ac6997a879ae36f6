"""Whether a model can be compiled for a target at all, found out before any long work starts."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.errors import BadModel
from qcompiler.model import Model
from qcompiler.target import Backend, check_operators

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def check_suitable(model: Model, backend: Backend) -> None:
    """Raise BadModel for a model without inputs, one that is not deterministic, or one that `backend` refuses."""
    if not any(value.name not in model.graph.initializers for value in model.graph.inputs):
        what = "the model has no inputs: its outputs are constants, and there is nothing to compile"
        raise BadModel(what, model.name, "export the model with its inputs")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain in ("", "ai.onnx") and _is_random(node):
            raise BadModel(
                f"the model is not deterministic ({node.op_type}), so no compiled form of it can be verified",
                f"{model.name}, node '{node.name or node.outputs[0].name}'",
                "export it for inference, or make the random numbers an input",
            )
    check_operators(backend, model)


def _is_random(node: ir.Node) -> bool:
    if node.op_type == "Dropout":
        return _constant(node, 2, 0.0) != 0 and _constant(node, 1, 0.5) != 0
    return node.op_type in _RANDOM


def _constant(node: ir.Node, index: int, default: float) -> float:
    """A scalar input, or the default where it is left out or not known."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return default if tensor is None else float(tensor.numpy())
