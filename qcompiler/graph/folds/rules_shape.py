"""Rules of operations that move numbers without changing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph.folds.labels import Dim, Labels, Unfit, reshape
from qcompiler.graph.folds.region import Mark, Region, dims, label


def transpose(region: Region, node: ir.Node) -> None:
    """Transpose: axes move."""
    given = node.attributes.get("perm")
    rank = len(dims(node.outputs[0]))
    perm = list(range(rank))[::-1] if given is None else list(given.as_ints())
    source, result = region.get(node.inputs[0]), region.get(node.outputs[0])
    if source is not None:
        region.mark(node.outputs[0], np.transpose(source.labels, perm), source.sign)
    elif result is not None:
        region.put(node, 0, np.transpose(result.labels, np.argsort(perm)), result.sign, "data")


def reshaping(region: Region, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: axes are regrouped."""
    before, after = _named(node)
    source, result = region.get(node.inputs[0]), region.get(node.outputs[0])
    if source is not None:
        region.mark(node.outputs[0], reshape(source.labels, before, after), source.sign)
    elif result is not None:
        region.put(node, 0, reshape(result.labels, after, before), result.sign, "data")


def moved_back(labels: Labels, node: ir.Node) -> Labels:
    """Labels of the output of a Reshape or Transpose as labels of its input."""
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return np.transpose(labels, None if perm is None else np.argsort(perm.as_ints()))
    before, after = _named(node)
    return reshape(labels, after, before)


def _named(node: ir.Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Shapes before and after; unknown axes that a Reshape copies get one name on both sides."""
    assert node.inputs[0] is not None
    before, after = list(dims(node.inputs[0])), list(dims(node.outputs[0]))
    shape = ints(node, 1) if node.op_type == "Reshape" else None
    for k, entry in enumerate(shape or ()):
        if entry == 0 and before[k] is None:
            before[k] = after[k] = f"axis {k}"
    return tuple(before), tuple(after)


def expand(region: Region, node: ir.Node) -> None:
    """Expand: a broadcast copy."""
    source, result = region.get(node.inputs[0]), region.get(node.outputs[0])
    if source is not None:
        region.mark(node.outputs[0], source.labels, source.sign)
    if result is not None:
        region.put(node, 0, result.labels, result.sign, "data")


def concat(region: Region, node: ir.Node) -> None:
    """Concat: labels side by side, or the same labels where another axis is joined."""
    out = node.outputs[0]
    axis = _axis(node, len(dims(out)))
    mark = _first(region, node)
    if mark.labels.shape[axis] == 1 and _length(out, axis) != 1:
        for index in range(len(node.inputs)):
            region.put(node, index, mark.labels, mark.sign, "data")
        region.mark(out, mark.labels, mark.sign)
        return
    shape = list(mark.labels.shape)
    shape[axis] = _length(out, axis)
    result = region.get(out)
    labels = region.classes.fresh(shape) if result is None else np.broadcast_to(result.labels, shape)
    start = 0
    for index, value in enumerate(node.inputs):
        assert value is not None
        stop = start + _length(value, axis)
        part = np.take(labels, range(start, stop), axis)
        own = region.get(value)
        if own is not None:
            region.classes.tie(own.labels, part)
        region.put(node, index, part, mark.sign, "data")
        start = stop
    region.mark(out, labels, mark.sign)


def split(region: Region, node: ir.Node) -> None:
    """Split: the inverse of Concat."""
    source = node.inputs[0]
    assert source is not None
    axis = _axis(node, len(dims(source)))
    start, parts = 0, list[_Part]()
    for value in node.outputs:
        length = dims(value)[axis]
        stop = start + length if isinstance(length, int) else start
        parts.append(_Part(value, {axis: np.arange(start, stop)}))
        start = stop
    _parts(region, node, parts)


def slicing(region: Region, node: ir.Node) -> None:
    """Slice with constant bounds."""
    source = node.inputs[0]
    assert source is not None
    starts, ends = ints(node, 1), ints(node, 2)
    if starts is None or ends is None:
        raise Unfit(f"the bounds of {label(node)} are computed")
    axes = ints(node, 3) or list(range(len(starts)))
    steps = ints(node, 4) or [1] * len(starts)
    picks: dict[int, Labels] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = dims(source)[axis]
        whole = np.arange(length if isinstance(length, int) else 0)
        picks[axis % len(dims(source))] = whole[start : max(end, -(len(whole) + 1)) : step]
    _parts(region, node, [_Part(node.outputs[0], picks)])


def gather(region: Region, node: ir.Node) -> None:
    """Gather: of constant indices a part of the channels, else look-ups in a table."""
    indices = node.inputs[1]
    tensor = None if indices is None else ir.convenience.get_const_tensor(indices)
    if tensor is None or len(tensor.shape) > 1:
        _look_up(region, node)
        return
    source = node.inputs[0]
    assert source is not None
    axis = _axis(node, len(dims(source)))
    length = dims(source)[axis]
    picks = tensor.numpy().astype(np.int64) % (length if isinstance(length, int) else 1)
    _parts(region, node, [_Part(node.outputs[0], {axis: picks})])


@dataclass(frozen=True)
class _Part:
    """An output that holds some of the channels of an input: axis -> indices (a scalar drops the axis)."""

    value: ir.Value
    picks: Mapping[int, Labels]

    def of(self, labels: Labels) -> Labels:
        """The labels of the part."""
        for axis, pick in self.picks.items():
            index = pick if labels.shape[axis] > 1 else np.zeros((1,) * pick.ndim, np.int64)
            labels = np.take(labels, index, axis)
        return labels


def _parts(region: Region, node: ir.Node, parts: Sequence[_Part]) -> None:
    """Outputs that are parts of input 0. Channels of the input that no marked output holds get new labels."""
    source = node.inputs[0]
    assert source is not None
    mark = region.get(source)
    if mark is None:
        part, result = next((p, m) for p in parts if (m := region.get(p.value)) is not None)
        shape = _whole(part, result.labels, source)
        mark = Mark(region.classes.fresh(shape), result.sign)
        region.put(node, 0, mark.labels, mark.sign, "data")
    for part in parts:
        region.mark(part.value, part.of(mark.labels), mark.sign)


def _whole(part: _Part, labels: Labels, source: ir.Value) -> list[int]:
    """The shape of the labels of the input: full along an axis that carries labels or of which one entry is taken."""
    shape = list(labels.shape)
    for axis, pick in part.picks.items():
        if pick.ndim == 0:
            shape.insert(axis, 1)
        length = dims(source)[axis]
        if shape[axis] > 1 or (pick.size == 1 and isinstance(length, int)):
            shape[axis] = _length(source, axis)
    return shape


def _look_up(region: Region, node: ir.Node) -> None:
    """Computed indices: look-ups in a table, or the choice of rows; channels stay channels."""
    table, indices = node.inputs[0], node.inputs[1]
    assert table is not None
    assert indices is not None
    rank, extra = len(dims(table)), len(dims(indices))
    axis = _axis(node, rank)
    source, result = region.get(table), region.get(node.outputs[0])
    if result is not None:
        places = range(axis, axis + extra)
        kept = [k for k in range(result.labels.ndim) if k not in places]
        labels = region.classes.only(result.labels, kept)
        shape = [labels.shape[k] for k in kept]
        region.put(node, 0, labels.reshape([*shape[:axis], 1, *shape[axis:]]), result.sign, "table")
    elif source is not None:
        labels = region.classes.only(source.labels, [k for k in range(rank) if k != axis])
        shape = list(labels.shape)
        region.mark(node.outputs[0], labels.reshape([*shape[:axis], *[1] * extra, *shape[axis + 1 :]]), source.sign)


def spatial(region: Region, node: ir.Node) -> None:
    """Pools, Pad with zeros, Resize: linear maps of the axes that carry no labels."""
    source = node.inputs[0]
    assert source is not None
    if region.kind == "rotate" and not node.op_type.endswith("AveragePool"):
        raise Unfit(f"a rotate cannot cross {label(node)}")
    mark = _first(region, node)
    before, after = dims(source), dims(node.outputs[0])
    moved = [k for k, size in enumerate(mark.labels.shape) if size > 1 and (k > 1 or before[k] != after[k])]
    if moved:
        raise Unfit(f"{label(node)} works along the channels")
    if node.op_type == "Pad" and _pads_nonzero(node):
        raise Unfit(f"{label(node)} pads with a constant")
    region.mark(node.outputs[0], mark.labels, mark.sign)
    region.put(node, 0, mark.labels, mark.sign, "data")


def _pads_nonzero(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return False
    return value.const_value is None or bool(np.any(value.const_value.numpy()))


def reduction(region: Region, node: ir.Node) -> None:
    """ReduceMean, ReduceSum, ReduceMax, ReduceMin, ReduceL1, ReduceL2 over axes without labels."""
    source = node.inputs[0]
    assert source is not None
    if region.kind == "rotate" and node.op_type not in ("ReduceMean", "ReduceSum"):
        raise Unfit(f"a rotate cannot cross {label(node)}")
    rank = len(dims(source))
    axes = axes_of(node, rank)
    keep = node.attributes.get("keepdims")
    kept = keep is None or keep.as_int() == 1
    mark, result = region.get(source), region.get(node.outputs[0])
    if mark is not None:
        if any(mark.labels.shape[axis] > 1 for axis in axes):
            if region.kind == "permute" and all(n == 1 or k in axes for k, n in enumerate(mark.labels.shape)):
                return  # a sum over all channels does not see their order
            raise Unfit(f"{label(node)} sums over the channels")
        labels = mark.labels if kept else np.squeeze(mark.labels, tuple(axes))
        region.mark(node.outputs[0], labels, mark.sign)
    elif result is not None:
        labels = result.labels if kept else np.expand_dims(result.labels, tuple(axes))
        region.put(node, 0, labels, result.sign, "data")


def ints(node: ir.Node, index: int) -> list[int] | None:
    """A constant list of integers among the inputs."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(x) for x in tensor.numpy().reshape(-1)]


def _axis(node: ir.Node, rank: int) -> int:
    given = node.attributes.get("axis")
    return (0 if given is None else given.as_int()) % rank


def axes_of(node: ir.Node, rank: int) -> list[int]:
    """What a reduction of a value of this rank sums over."""
    given = node.attributes.get("axes")
    found = list(given.as_ints()) if given is not None else ints(node, 1)
    if found is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise Unfit(f"the axes of {label(node)} are computed")
    return [axis % rank for axis in found] if found is not None else list(range(rank))


def _length(value: ir.Value, axis: int) -> int:
    length = dims(value)[axis]
    if not isinstance(length, int):
        raise Unfit(f"the length of axis {axis} of '{value.name}' is unknown")
    return length


def _first(region: Region, node: ir.Node) -> Mark:
    """The mark that the node was reached by; outputs first."""
    marks = (region.get(v) for v in (*node.outputs, *node.inputs))
    return next(mark for mark in marks if mark is not None)
