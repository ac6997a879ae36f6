"""Adding a correction to the bias of an operation, making one where there is none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.graph.sites import Site

Floats = npt.NDArray[np.float32]


def has_bias(site: Site) -> bool:
    """Whether every operation that uses the site's weight has a bias already, which a correction can go into."""
    users = [node for node in site.users if node.op_type != "Gather"]
    return all(_bias_of(node, site.rows) is not None for node in users)


def add_to_bias(graph: ir.Graph, site: Site, shift: Floats) -> None:
    """Add `shift` (float32 [rows]) to the output of every product or convolution that uses the site's weight.

    Raises:
        PassRefused: if nothing but Gather uses it.
    """
    users = [node for node in site.users if node.op_type != "Gather"]
    if not users:
        raise PassRefused("a table that is only gathered from has no bias to correct", where=site.name)
    for node in users:
        place = _bias_of(node, shift.size)
        if place is not None:
            user, index = place
            _set_constant(graph, user, index, _numpy(user.inputs[index]) + _divided(shift, user))
        elif node.op_type != "MatMul" and len(node.inputs) < 3 and _factor(node):
            node.resize_inputs(3)
            _set_constant(graph, node, 2, _divided(shift, node))
        else:
            append_add(graph, node, _constant(graph, node, None, shaped(site, shift)))


def is_biased(value: ir.Value) -> bool:
    """Whether the operation that makes a value ends in a constant bias along the last axis, which can be corrected."""
    return _bias_before(value) is not None


def add_to_value(graph: ir.Graph, value: ir.Value, shift: Floats) -> None:
    """Add `shift` (float32 [channels], along the last axis) to a value that a node makes, for all that read it."""
    node, place = value.producer(), _bias_before(value)
    assert node is not None
    if place is not None:
        _set_constant(graph, node, place, _numpy(node.inputs[place]) + shift)
    elif node.op_type == "LayerNormalization":
        node.resize_inputs(3)
        _set_constant(graph, node, 2, shift)
    else:
        append_add(graph, node, _constant(graph, node, None, shift))


def _bias_before(value: ir.Value) -> int | None:
    """Which input of the node that makes a value is its bias: of a LayerNormalization, or of an Add."""
    node = value.producer()
    places = () if node is None or node.domain else {"LayerNormalization": (2,), "Add": (0, 1)}.get(node.op_type, ())
    for index in places:
        operand = node.inputs[index] if node is not None and index < len(node.inputs) else None
        constant = None if operand is None else ir.convenience.get_const_tensor(operand)
        if constant is not None and constant.size == constant.shape[-1] == (value.shape or (None,))[-1]:
            return index
    return None


def _bias_of(node: ir.Node, rows: int) -> tuple[ir.Node, int] | None:
    """Where the constant bias of an operation is: its third input, or an addition to the sum that it is a term of."""
    own = _own_bias(node)
    if own is not None or node.op_type not in ("MatMul", "Gemm"):
        return own
    return _added_to(node.outputs[0], rows)


def _own_bias(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The third input of a Gemm or a convolution, if it is a constant."""
    value = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None or not _factor(node) else (node, 2)


def _added_to(value: ir.Value, rows: int) -> tuple[ir.Node, int] | None:
    """A constant vector [rows] that is added to a value, or to a sum in which alone it is a term."""
    add = _only_sum(value)
    if add is None:
        return None
    index = next(i for i, term in enumerate(add.inputs) if term is not value)
    other = add.inputs[index]
    constant = None if other is None else ir.convenience.get_const_tensor(other)
    if constant is not None:
        return (add, index) if constant.size == rows and constant.shape[-1] == rows else None
    if add.outputs[0].shape is None or add.outputs[0].shape != value.shape:
        return None  # the sum may hold the term several times
    return _bias_within(other) or _added_to(add.outputs[0], rows)


def _bias_within(value: ir.Value | None) -> tuple[ir.Node, int] | None:
    """The bias of another product in the same sum."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or _only_sum(value) is None:
        return None
    if producer.op_type == "Add" and not producer.domain:
        return next((found for term in producer.inputs if (found := _bias_within(term)) is not None), None)
    return _own_bias(producer) if producer.op_type == "Gemm" else None


def _only_sum(value: ir.Value) -> ir.Node | None:
    """The addition that alone reads a value."""
    uses = tuple(value.uses())
    alone = len(uses) == 1 and not value.is_graph_output()
    return uses[0].node if alone and uses[0].node.op_type == "Add" and not uses[0].node.domain else None


def _divided(shift: Floats, node: ir.Node) -> Floats:
    return np.asarray(shift / _factor(node), np.float32)


def _factor(node: ir.Node) -> float:
    """What a Gemm multiplies its bias with; 1 for other operations."""
    beta = node.attributes.get("beta")
    return 1.0 if beta is None else beta.as_float()


def append_add(graph: ir.Graph, node: ir.Node, term: ir.Value) -> None:
    """Put an Add behind the node; its result takes over the name, for graph outputs and calibrated ranges."""
    old = node.outputs[0]
    name, old.name = old.name, f"{old.name}_uncorrected"
    new = ir.val(name, dtype=old.dtype, shape=old.shape)
    add = ir.node("Add", [None, term], name=f"{name}_bias", outputs=[new])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    add.replace_input_with(0, old)
    graph.insert_after(node, add)


def shaped(site: Site, shift: Floats) -> Floats:
    """A shift [rows] in a form that broadcasts against the output of the site's operations."""
    if site.layout.startswith("conv"):
        return shift.reshape(-1, *[1] * (len(site.shape) - 2))
    if site.layout == "columns-first" and len(site.shape) > 2:
        return shift.reshape(*site.shape[:-2], 1, site.shape[-1])
    return shift


def _numpy(value: ir.Value | None) -> npt.NDArray[np.float32]:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return np.asarray(tensor.numpy(), np.float32)


def _set_constant(graph: ir.Graph, node: ir.Node, index: int, array: npt.NDArray[np.float32]) -> None:
    """A new initializer as an input: the old one may be shared with other operations."""
    old = node.inputs[index]
    node.replace_input_with(index, _constant(graph, node, old, array))
    if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
        del graph.initializers[str(old.name)]


def _constant(graph: ir.Graph, node: ir.Node, like: ir.Value | None, array: npt.NDArray[np.float32]) -> ir.Value:
    """A new initializer, of the type of what it replaces or else of the node's data."""
    data = node.inputs[0] or node.outputs[0]
    dtype = (like.dtype if like is not None else data.dtype) or ir.DataType.FLOAT
    name = f"{node.name or node.outputs[0].name}_bias_corrected"
    while name in graph.initializers:  # several terms of a sum have been corrected
        name += "_too"
    value = ir.val(name, const_value=ir.tensor(array.astype(dtype.numpy()), name=name))
    graph.register_initializer(value)
    return value
