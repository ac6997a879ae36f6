"""Rules of operations that work entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph.folds.labels import Labels
from qcompiler.graph.folds.region import Mark, Region, Undecided, dims, label, resolve

SAME = frozenset({"Identity", "Dropout", "Cast"})
HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu", "Neg", "Abs"})  # f(s x) = s f(x) for s > 0
SUMS = frozenset({"Add", "Sub", "Sum", "Max", "Min", "Mean", "Where"})


def alike(region: Region, node: ir.Node, inputs: Sequence[int]) -> None:
    """These inputs and the output carry the same labels."""
    out = node.outputs[0]
    for index in inputs:
        mark = region.get(node.inputs[index])
        if mark is not None:
            region.mark(out, mark.labels, mark.sign)
    result = region.get(out)
    if result is None:
        return
    for index in inputs:
        value = node.inputs[index]
        if region.kind == "permute" and value is not None and _same_for_all(value, result.labels):
            continue
        region.put(node, index, result.labels, result.sign, "data")


def _same_for_all(value: ir.Value, labels: Labels) -> bool:
    """Whether an operand is broadcast along the labelled axes: whatever the order of channels, it fits."""
    pairs = zip(reversed(dims(value)), reversed(labels.shape), strict=False)
    return all(dim == 1 or size == 1 for dim, size in pairs)


def unary(region: Region, node: ir.Node) -> None:
    """Identity, Cast, Dropout; where a scale may cross, Relu and its kind; where a loose shift may, Relu."""
    loose = region.kind == "shift" and region.loose and node.op_type == "Relu"
    if region.kind in ("shift", "rotate") and node.op_type in HOMOGENEOUS and not loose:
        region.pin_node(node, f"a {region.kind} cannot cross {label(node)}")
        return
    inputs = range(len(node.inputs)) if region.kind == "permute" else (0,)
    alike(region, node, [k for k in inputs if node.inputs[k] is not None])


def pointwise(region: Region, node: ir.Node) -> None:
    """Any function of one number: only a permutation may cross."""
    if region.kind != "permute":
        region.pin_node(node, f"a {region.kind} cannot cross {label(node)}")
        return
    alike(region, node, (0,))


def sums(region: Region, node: ir.Node) -> None:
    """Add, Sub, Max, Min, Where ...: all terms carry the same labels."""
    first = 1 if node.op_type == "Where" else 0
    if region.kind == "shift":
        _shifted_sum(region, node)
        return
    if region.kind == "rotate" and node.op_type not in ("Add", "Sub", "Sum", "Mean"):
        region.pin_node(node, f"a rotate cannot cross {label(node)}")
        return
    alike(region, node, range(first, len(node.inputs)))


def _shifted_sum(region: Region, node: ir.Node) -> None:
    """A shift of a sum is a shift of its constant term (a bias); nothing else needs to move."""
    source = [k for k, v in enumerate(node.inputs) if region.get(v)]
    result = region.get(node.outputs[0])
    constant = [k for k, v in enumerate(node.inputs) if v is not None and resolve(v) is not None]
    if node.op_type not in ("Add", "Sub") or source or result is None or not constant:
        region.pin_node(node, f"a shift cannot cross {label(node)}")
        return
    sign = -result.sign if node.op_type == "Sub" and constant[0] == 1 else result.sign
    region.put(node, constant[0], result.labels, sign, "out")


def product(region: Region, node: ir.Node) -> None:
    """Mul and Div: a constant per channel absorbs the transform, else one of the two operands carries it."""
    a, b = node.inputs
    assert a is not None
    assert b is not None
    if region.kind == "permute":
        alike(region, node, (0, 1))
        return
    if region.kind == "rotate":
        _rotated_product(region, node)
        return
    if region.kind == "shift":
        region.pin_node(node, f"a shift cannot cross {label(node)}")
        return
    constants = [k for k, v in enumerate((a, b)) if resolve(v) is not None or v.const_value is not None]
    if constants:
        _with_constant(region, node, constants[-1])
    else:
        _of_two(region, node)


def _rotated_product(region: Region, node: ir.Node) -> None:
    """A rotation crosses a product with numbers that are the same for all its channels, and no other."""
    marks = [region.get(v) for v in (*node.inputs, *node.outputs)]
    mark = next(m for m in marks if m is not None)
    carriers = [k for k, v in enumerate(node.inputs) if v is not None and not _same_for_all(v, mark.labels)]
    if len(carriers) != 1 or (node.op_type == "Div" and carriers == [1]):
        region.pin_node(node, f"a rotate cannot cross {label(node)}")
        return
    alike(region, node, carriers)


def _with_constant(region: Region, node: ir.Node, index: int) -> None:
    constant, other, out = node.inputs[index], node.inputs[1 - index], node.outputs[0]
    assert constant is not None
    source, result = region.get(other), region.get(out)
    mark = source or result
    assert mark is not None
    divides = node.op_type == "Div"
    flip = -1 if divides and index == 0 else 1  # c / x carries the inverse of x
    if not _per_channel(constant, mark.labels):
        if source is not None:
            region.mark(out, source.labels, flip * source.sign)
        elif result is not None:
            region.put(node, 1 - index, result.labels, flip * result.sign, "data")
        return
    up = -1 if divides and index == 1 else 1
    if result is not None:
        region.put(node, index, result.labels, up * result.sign, "out")
    if source is not None:
        region.put(node, index, source.labels, -up * flip * source.sign, "in")


def _per_channel(constant: ir.Value, labels: Labels) -> bool:
    """Whether a constant varies along the labelled axes and along no other (a gain, not a cosine table)."""
    shape = dims(constant)
    along = [(a, b) for a, b in zip(reversed(shape), reversed(labels.shape), strict=False) if a != 1]
    return bool(along) and len(shape) <= labels.ndim and all(b != 1 for _, b in along)


def _of_two(region: Region, node: ir.Node) -> None:
    a, b, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert a is not None
    assert b is not None
    first, second, result = region.get(a), region.get(b), region.get(out)
    if first is not None and second is not None:
        region.pin_node(node, f"both operands of {label(node)} would be scaled")
        return
    if first is None and second is None and result is not None:
        if node not in region.choices:
            raise Undecided(node)
        index = region.choices[node]
        sign = -1 if node.op_type == "Div" and index == 1 else 1
        region.put(node, index, result.labels, sign * result.sign, "data")
        return
    carrier = first or second
    if carrier is None:
        return
    sign = -1 if node.op_type == "Div" and second is not None else 1
    region.mark(out, carrier.labels, sign * carrier.sign)


def reciprocal(region: Region, node: ir.Node) -> None:
    """Reciprocal: the inverse scale."""
    if region.kind != "scale":
        pointwise(region, node)
        return
    source, result = region.get(node.inputs[0]), region.get(node.outputs[0])
    if source is not None:
        region.mark(node.outputs[0], source.labels, -source.sign)
    elif result is not None:
        region.put(node, 0, result.labels, -result.sign, "data")


def clip(region: Region, node: ir.Node) -> None:
    """Clip(0, inf) is a Relu; other bounds would have to follow the channels."""
    low, high = (_bound(node, k) for k in (1, 2))
    spans_zero = low is not None and high is not None and low <= 0 <= high
    if region.kind == "permute" or (region.kind == "scale" and (low, high) == (0, np.inf)):
        alike(region, node, (0,))
        return
    if region.kind == "scale" and region.loose and spans_zero:
        alike(region, node, (0,))
        region.loose_clips[node] = region.marks[node.outputs[0]]
        return
    if region.kind in ("shift", "rotate") or low is None or high is None or not region.insert:
        reason = f"a {region.kind} cannot cross {label(node)}, whose bounds hold for all channels"
        region.pin_node(node, reason)
        return
    alike(region, node, (0,))
    mark = region.get(node.outputs[0])
    assert mark is not None
    region.clips[node] = Mark(mark.labels, mark.sign)


def _bound(node: ir.Node, index: int) -> float | None:
    """A bound of Clip: infinite if absent, None if computed. Before opset 11 bounds are attributes."""
    name, infinite = ("min", -np.inf) if index == 1 else ("max", np.inf)
    if name in node.attributes:
        return node.attributes[name].as_float()
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return infinite
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else float(tensor.numpy().reshape(()))
