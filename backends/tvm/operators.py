"""Which operators of a model target cpu has no implementation of."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.backends.tvm.decompose import decomposed, refusal
from qcompiler.backends.tvm.tvm_api import onnx_frontend
from qcompiler.errors import BadModel

_DOMAINS = ("", "ai.onnx", "com.microsoft")  # TVM goes by the operator's name alone
_BUILT_IN = ("If", "Constant")  # TVM's importer handles these without a converter


def check_operators(model: ir.Model, name: str) -> None:
    """Look at every node before any long work starts.

    Args:
        model: the graph as it was captured.
        name: for the message.

    Raises:
        BadModel: names the first node without an implementation, and all such operators.
    """
    known = {*onnx_frontend._get_convert_map(), *_BUILT_IN}
    lacking: dict[str, tuple[ir.Node, str]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_identifier() in model.functions:
            continue
        reason = refusal(node)
        if reason is None and not decomposed(node) and (node.domain not in _DOMAINS or node.op_type not in known):
            reason = ""
        if reason is not None:
            lacking.setdefault(node.op_type, (node, reason))
    if not lacking:
        return
    (operator, (node, reason)), *others = lacking.items()
    detail = f", where {reason}" if reason else ""
    more = f", and none of {', '.join(other for other, _ in others)}" if others else ""
    what = f"target cpu has no implementation of {operator}{detail}{more}"
    raise BadModel(what, f"{name}, node '{node.name or node.outputs[0].name}'", "use --target onnx")
