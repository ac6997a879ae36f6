"""Rules of products with weights (where transforms end) and of products of two values (attention)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.folds.labels import Labels, Unfit
from qcompiler.graph.folds.region import Region, bias_add, dims, label, resolve


def matmul(region: Region, node: ir.Node) -> None:
    """MatMul: rows of a, columns of b go through; what is summed over must cancel between a and b."""
    a, b = node.inputs
    out = node.outputs[0]
    assert a is not None
    assert b is not None
    if region.kind == "shift":
        _shifted(region, node, b if resolve(b) is not None else None)
        return
    weighted = resolve(a) is not None or resolve(b) is not None
    if not weighted:
        _heads(region, node)
    left, right, result = region.get(a), region.get(b), region.get(out)
    if result is not None:
        rows, columns = result.labels.shape[-2:] if result.labels.ndim > 1 else (1, 1)
        if rows > 1 and columns > 1:
            raise Unfit(f"labels vary along rows and columns of {label(node)}")
        if rows > 1:
            region.put(node, 0, result.labels, result.sign, "out")
        else:
            region.put(node, 1, result.labels, result.sign, "out")
    if left is not None:
        _left(region, node, left.labels, left.sign)
    if right is not None:
        _right(region, node, right.labels, right.sign)


def _left(region: Region, node: ir.Node, labels: Labels, sign: int) -> None:
    summed, rows = labels.shape[-1] > 1, labels.ndim > 1 and labels.shape[-2] > 1
    if summed and rows:
        raise Unfit(f"labels vary along rows and columns of {label(node)}")
    if not summed:
        region.mark(node.outputs[0], labels, sign)
        return
    _check_reader(region, node, 1)
    other = np.swapaxes(labels, -1, -2) if labels.ndim > 1 else labels[:, None]
    region.put(node, 1, other, -sign, "in")


def _right(region: Region, node: ir.Node, labels: Labels, sign: int) -> None:
    summed, columns = labels.shape[-2] > 1, labels.shape[-1] > 1
    if summed and columns:
        raise Unfit(f"labels vary along rows and columns of {label(node)}")
    if summed:
        _check_reader(region, node, 0)
        region.put(node, 0, np.swapaxes(labels, -1, -2), -sign, "in")
    else:
        region.mark(node.outputs[0], labels, sign)


def _check_reader(region: Region, node: ir.Node, index: int) -> None:
    """Rotations end in weights: a part of the channels of two computed values has no product that stays."""
    value = node.inputs[index]
    if region.kind == "rotate" and (value is None or resolve(value) is None):
        raise Unfit(f"{label(node)} multiplies two computed values along the channels")


def _heads(region: Region, node: ir.Node) -> None:
    """Channels of different heads cannot change places: each head has its own attention."""
    for value in (*node.inputs, *node.outputs):
        mark = region.get(value)
        if region.kind in ("permute", "rotate") and mark is not None and mark.labels.ndim > 2:
            shape = mark.labels.shape
            heads = np.arange(int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
            region.blocks.append((mark.labels, np.broadcast_to(heads, shape)))


def gemm(region: Region, node: ir.Node) -> None:
    """Gemm with a constant B: like MatMul and Add."""
    a, b = node.inputs[0], node.inputs[1]
    assert b is not None
    if _int(node, "transA", 0) or resolve(b) is None:
        region.pin_node(node, f"{label(node)} is no layer with a constant weight")
        return
    if region.kind == "shift":
        _shifted(region, node, b)
        return
    flipped = _int(node, "transB", 0) == 1
    result, source = region.get(node.outputs[0]), region.get(a)
    if result is not None:
        row = region.classes.only(result.labels, [-1])
        region.put(node, 1, row.T if flipped else row, result.sign, "out")
        region.put(node, 2, row, result.sign, "out")
    if source is not None:
        row = region.classes.only(source.labels, [-1])
        region.put(node, 1, row if flipped else row.T, -source.sign, "in")


def conv(region: Region, node: ir.Node) -> None:
    """Conv, grouped and depthwise too, and ConvTranspose."""
    x, w = node.inputs[0], node.inputs[1]
    assert w is not None
    if resolve(w) is None:
        region.pin_node(node, f"the kernel of {label(node)} is computed")
        return
    if region.kind == "shift":
        _shifted(region, node, w)
        return
    groups, kernel = _int(node, "group", 1), len(dims(w)) - 2
    shape = [d for d in dims(w)[:2] if isinstance(d, int)]
    result, source = region.get(node.outputs[0]), region.get(x)
    flipped = node.op_type == "ConvTranspose"
    if region.kind == "rotate" and groups > 1:
        region.pin_node(node, f"a rotate cannot cross the groups of {label(node)}")
        return
    if region.kind == "permute" and groups > 1:
        if shape[0] != groups or shape[1] != 1 or flipped:
            region.pin_node(node, f"the groups of {label(node)} fix the order of channels")
            return
        mark = result or source
        assert mark is not None
        region.mark(node.outputs[0], mark.labels, mark.sign)
        region.put(node, 0, mark.labels, mark.sign, "data")
        source, result = None, mark
    first, second = (source, result) if flipped else (result, source)
    for mark, grouped in ((first, False), (second, True)):
        if mark is None:
            continue
        channels = region.classes.only(mark.labels, [1]).reshape(-1)
        spread = _grouped(channels, shape, groups) if grouped else channels[:, None]
        sign, role = (mark.sign, "out") if mark is result else (-mark.sign, "in")
        region.put(node, 1, spread.reshape(spread.shape + (1,) * kernel), sign, role)
        if mark is result:
            region.put(node, 2, channels, mark.sign, "out")


def _grouped(channels: Labels, shape: list[int], groups: int) -> Labels:
    """Labels of kernel axis 1, which counts the channels of a group only: [shape[0] or 1, shape[1]]."""
    if groups == 1 or channels.size == 1:
        return channels[None]
    group = (np.arange(shape[0]) // (shape[0] // groups))[:, None]
    return channels[group * shape[1] + np.arange(shape[1])[None, :]]


def norm(region: Region, node: ir.Node) -> None:
    """LayerNormalization, RMSNormalization ...: the gain (and bias) absorb what follows; nothing crosses."""
    source, out = node.inputs[0], node.outputs[0]
    mark, result = region.get(source), region.get(out)
    if len(node.outputs) > 1 and any(region.get(v) for v in node.outputs[1:]):
        region.pin_node(node, f"{label(node)} gives out its statistics")
        return
    if region.kind == "rotate":
        region.pin_node(node, f"a rotate cannot cross {label(node)}")
        return
    if region.kind == "permute":
        _permuted_norm(region, node)
        return
    if mark is not None:
        region.pin(mark.labels, f"a {region.kind} cannot cross {label(node)}")
    if result is None:
        return
    if not node.op_type.startswith(("LayerNorm", "RMSNorm", "SimplifiedLayerNorm")):
        axis, labels = 1, region.classes.only(result.labels, [1]).reshape(-1)
    else:
        axis, labels = _int(node, "axis", -1) % result.labels.ndim, result.labels
        if any(size > 1 for size in labels.shape[:axis]):
            labels = region.classes.only(labels, range(axis, labels.ndim))
        labels = labels.reshape(labels.shape[axis:])
    if region.kind == "scale":
        region.put(node, 1, labels, result.sign, "out")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        region.put(node, 2, labels, result.sign, "out")
    elif region.kind == "shift":
        if node.op_type == "LayerNormalization":
            region.biases[node] = labels
        else:
            region.pin(result.labels, f"{label(node)} has no bias")


def _permuted_norm(region: Region, node: ir.Node) -> None:
    mark = region.get(node.outputs[0]) or region.get(node.inputs[0])
    assert mark is not None
    rank = mark.labels.ndim
    last = _int(node, "axis", -1) % rank == rank - 1
    whole = node.op_type.startswith(("LayerNorm", "RMSNorm", "SimplifiedLayerNorm", "BatchNorm"))
    if not whole or (not last and not node.op_type.startswith("BatchNorm")):
        region.pin_node(node, f"{label(node)} fixes the order of channels")
        return
    region.mark(node.outputs[0], mark.labels, mark.sign)
    region.put(node, 0, mark.labels, mark.sign, "data")
    axis = 1 if node.op_type.startswith("BatchNorm") else rank - 1
    labels = region.classes.only(mark.labels, [axis]).reshape(-1)
    for index in range(1, len(node.inputs)):
        region.put(node, index, labels, mark.sign, "out")


def _shifted(region: Region, node: ir.Node, weight: ir.Value | None) -> None:
    """A shift ends in the bias: of the producer directly, of the consumer through its weight."""
    result, source = region.get(node.outputs[0]), region.get(node.inputs[0])
    if weight is None or (result is not None and source is not None):
        region.pin_node(node, f"a shift cannot cross {label(node)}")
        return
    axis = -1 if node.op_type in ("MatMul", "Gemm") else 1
    if source is not None and _pads(node):
        region.pin(source.labels, f"{label(node)} pads with zeros, which a shift would move")
    elif source is not None and node.op_type == "MatMul" and not (region.insert or bias_add(node)):
        region.pin(source.labels, f"{label(node)} has no bias that could make up for a shift")
    elif source is not None:
        region.reads[node] = region.classes.only(source.labels, [axis]).reshape(-1)
    elif result is not None:
        labels = region.classes.only(result.labels, [axis]).reshape(-1)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            region.put(node, 2, labels, result.sign, "out")
        elif node.op_type != "MatMul":
            region.biases[node] = labels
        else:
            region.pin(result.labels, f"{label(node)} has no bias")


def _pads(node: ir.Node) -> bool:
    auto = node.attributes.get("auto_pad")
    if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
        return True
    pads = node.attributes.get("pads")
    return pads is not None and any(pads.as_ints())


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
