"""Residual streams made ready to be turned: gains of norms folded, tied tables set free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.folds import Stream, find_stream


def without_gains(model: ir.Model, stream: Stream) -> tuple[Stream, list[ir.Node]] | Refusal:
    """Make a stream ready to be turned.

    Args:
        model: whose graph is changed; not if there is a refusal.
        stream: of that graph.

    Returns:
        The stream with the gains of its norms folded, and the products that were inserted so that tied tables stay as
        they are (they turn in their place); or why a gain cannot move.
    """
    products = _set_free(model, stream)
    # The first product is behind a table, so that the stream begins there now.
    found = find_stream(model, products[0].outputs[0]) if products else stream
    stuck = [found] if isinstance(found, Refusal) else found.fold_gains()
    if stuck or isinstance(found, Refusal):
        take_out(model, products)
        return stuck[0]
    return found, products


def _set_free(model: ir.Model, stream: Stream) -> list[ir.Node]:
    """Put products with the identity where a constant both writes and reads the stream and a gain is in the way."""
    if not stream.gains:
        return []
    tied = {turn.constant.value for turn in stream.writers} & {turn.constant.value for turn in stream.readers}
    made: list[ir.Node] = []
    for turn in stream.writers:
        if turn.constant.value in tied:
            made.append(_put_in(model, turn.node.outputs[0], None, stream.width))
    for turn in stream.readers:
        data = turn.node.inputs[0]
        if turn.constant.value in tied and data is not None:
            made.append(_put_in(model, data, turn.node, stream.width))
    return made


def _put_in(model: ir.Model, value: ir.Value, reader: ir.Node | None, width: int) -> ir.Node:
    """Multiply a value by the identity: for one reader, or for all."""
    name = f"{value.name}_turn"
    matrix = ir.val(name, const_value=ir.tensor(np.eye(width, dtype=np.float32), name=name))
    model.graph.register_initializer(matrix)
    users, producer = list(value.uses()), value.producer()
    node = ir.node("MatMul", [value, matrix], name=f"{name}_product")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}_out", value.shape, value.type
    assert producer is not None  # it belongs to a stream
    for user, index in users:
        if reader is None or user is reader:
            user.replace_input_with(index, out)
    model.graph.insert_after(producer, node)
    return node


def take_out(model: ir.Model, products: Sequence[ir.Node]) -> None:
    """Remove the products that `without_gains` has inserted, before anything was turned."""
    for node in products:
        value, matrix = node.inputs
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, value)
        model.graph.remove(node, safe=True)
        assert matrix is not None
        del model.graph.initializers[matrix.name or ""]
