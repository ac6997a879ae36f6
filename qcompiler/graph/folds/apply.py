"""Absorb a transform in the constants of a region: in float64, cast back, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption
from qcompiler.graph.folds.labels import Classes, Labels
from qcompiler.graph.folds.region import Constant, Edit, Mark, Region, bias_add, label, resolve
from qcompiler.graph.folds.rewrite import commit, largest, read, scaled

Floats = npt.NDArray[np.float64]


def scale(model: ir.Model, region: Region, start: Labels, s: Floats) -> None:
    """The started value is divided by s [channels]."""
    numbers = _by_class(region.classes, start, s)

    def factor(labels: Labels, sign: int) -> Floats:
        return _spread(region.classes, labels, numbers, 1.0) ** -sign

    steps: dict[ir.Value, list[tuple[float, Floats]]] = {}
    for edit in own_edits(model.graph, region):
        steps.setdefault(edit.constant.value, []).append((edit.constant.offset, factor(edit.labels, edit.sign)))
    commit({constant: scaled(constant, own) for constant, own in steps.items()})


def multipliers(region: Region, start: Labels, s: Floats, constant: ir.Value) -> Floats:
    """What `scale` would multiply a constant without offset by, broadcastable to it; nothing is changed."""
    numbers = _by_class(region.classes, start, s)
    product: Floats = np.ones((1,) * len(constant.shape or ()))
    for edit in region.edits.values():
        if edit.constant.value is constant:
            product = product * _spread(region.classes, edit.labels, numbers, 1.0) ** -edit.sign
    return product


def shift(model: ir.Model, region: Region, start: Labels, d: Floats) -> None:
    """The started value loses d [channels]."""
    numbers = _by_class(region.classes, start, d)

    def moved(labels: Labels) -> Floats:
        return _spread(region.classes, labels, numbers, 0.0)

    changes: dict[ir.Value, Floats] = {}
    for edit in own_edits(model.graph, region):
        constant = edit.constant.value
        changes[constant] = changes.get(constant, read(constant)) - edit.sign * moved(edit.labels)
    for node, labels in region.biases.items():
        bias = _new_bias(model.graph, node, labels.size)
        changes[bias] = -moved(labels).reshape(-1)
    for node, labels in region.reads.items():
        addition = _through_weight(node, moved(labels))
        bias = _bias_of(model.graph, node, addition.size)
        changes[bias] = changes.get(bias, read(bias)) + addition.reshape(read(bias).shape)
    commit(changes)


def permute(model: ir.Model, region: Region, start: Labels, ties: Labels, order: npt.NDArray[np.int64]) -> None:
    """Channel c of the started value becomes what channel order[c] was."""
    roots = region.classes.roots(start).reshape(-1)
    moved = order != np.arange(len(order))
    if np.any(ties[moved] < 0):
        raise BadOption("the permutation moves a channel that is fixed", fix="see Fold.free")
    target = {int(a): int(b) for a, b in zip(roots, roots[order], strict=True)}
    for labels, blocks in region.blocks:
        _check_blocks(region.classes.roots(labels), blocks, target)
    changes: dict[ir.Value, Floats] = {}
    for edit in own_edits(model.graph, region):
        constant = edit.constant.value
        array = changes.get(constant, read(constant))
        changes[constant] = _reordered(array, region.classes.roots(edit.labels), target)
    commit(changes)


def absmax(classes: Classes, start: Labels, edits: Sequence[Edit]) -> Floats:
    """[channels]: the largest |entry| of the edited constants that belongs to each channel; 0 if none does."""
    roots = classes.roots(start).reshape(-1)
    known, place = np.unique(roots, return_inverse=True)
    found = np.zeros(len(known))
    for edit in edits:
        short = tuple(k for k, size in enumerate(edit.labels.shape) if size == 1)
        reach = largest(edit.constant.value, edit.constant.offset, short)
        own = np.broadcast_to(classes.roots(edit.labels), reach.shape)
        inside = np.isin(own, known)
        np.maximum.at(found, np.searchsorted(known, own[inside]), reach[inside])
    return found[place]


def untie(model: ir.Model, node: ir.Node, index: int) -> None:
    """Give an operand its own copy of a shared weight, read through Transpose, Cast and the like.

    Raises:
        BadOption: the operand is no constant.
    """
    value = node.inputs[index]
    constant = None if value is None else resolve(value)
    if value is None or constant is None:
        raise BadOption("no constant to untie", label(node))
    array = read(constant.value) + constant.offset
    dtype = value.dtype or ir.DataType.FLOAT
    name = f"{constant.value.name}_own"
    copy = _register(model.graph, name, array.T if constant.transposed else array, dtype)
    node.replace_input_with(index, copy)
    while (producer := value.producer()) is not None and not value.uses() and not value.is_graph_output():
        value = next(v for v in producer.inputs if v is not None)  # what `resolve` has followed
        model.graph.remove(producer, safe=True)


def _by_class(classes: Classes, start: Labels, numbers: Floats) -> Mapping[int, float]:
    return dict(zip(classes.roots(start).reshape(-1).tolist(), numbers.tolist(), strict=True))


def _spread(classes: Classes, labels: Labels, numbers: Mapping[int, float], default: float) -> Floats:
    unique, inverse = np.unique(classes.roots(labels), return_inverse=True)
    found = np.array([numbers.get(int(root), default) for root in unique])
    return found[inverse].reshape(labels.shape)


def own_edits(graph: ir.Graph, region: Region) -> list[Edit]:
    """The edits of a region, after every shared vector has got a private copy and every Clip constants."""
    for node, mark in region.clips.items():
        for user in _per_channel_clip(graph, node, mark):
            constant = Constant(user.inputs[1], 0.0, False, "", True)  # type: ignore[arg-type]
            region.edits[user, 1, "data"] = Edit(constant, user, 1, mark.labels, mark.sign)
    region.clips.clear()
    own: dict[tuple[ir.Node, int], Constant] = {}
    for key, edit in region.edits.items():
        place = (edit.node, edit.index)
        if edit.constant.shared and place not in own:
            copy = _own(graph, edit.node, edit.index)
            own[place] = replace(edit.constant, value=copy, shared="")
        if place in own:
            region.edits[key] = replace(edit, constant=own[place])
    return list(region.edits.values())


def _register(graph: ir.Graph, name: str, array: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
    taken = {v.name for node in graph for v in node.outputs} | set(graph.initializers)
    unique = next(n for k in range(len(taken) + 1) if (n := f"{name}_{k}" if k else name) not in taken)
    tensor = ir.tensor(array.astype(dtype.numpy()), name=unique)
    value = ir.val(unique, const_value=tensor)
    graph.register_initializer(value)
    return value


def _reordered(array: Floats, roots: Labels, target: Mapping[int, int]) -> Floats:
    """Entry with label l becomes the entry with label target[l]; repeated labels keep their order of repetition."""
    axes = [k for k, size in enumerate(roots.shape) if size > 1]
    if not axes:
        return array
    axis = axes[-1]
    lines = np.moveaxis(roots, axis, -1)
    if len(axes) > 1 and not np.array_equal(lines, np.broadcast_to(lines[(0,) * (lines.ndim - 1)], lines.shape)):
        raise BadOption(f"a permutation along axes {axes} of one constant is not possible")
    line = lines[(0,) * (lines.ndim - 1)]
    places: dict[int, list[int]] = {}
    for position, root in enumerate(line.tolist()):
        places.setdefault(root, []).append(position)
    seen: dict[int, int] = {}
    index: list[int] = []
    for root in line.tolist():
        nth = seen.get(root, 0)
        seen[root] = nth + 1
        index.append(places[target.get(root, root)][nth])
    return np.take(array, index, axis)


def _check_blocks(roots: Labels, blocks: Labels, target: Mapping[int, int]) -> None:
    homes: dict[int, set[int]] = {}
    for root, block in zip(roots.reshape(-1).tolist(), blocks.reshape(-1).tolist(), strict=True):
        homes.setdefault(root, set()).add(block)
    if any(homes.get(target.get(root, root), home) != home for root, home in homes.items()):
        raise BadOption("the permutation moves a channel to another head", fix="permute within heads")


def _per_channel_clip(graph: ir.Graph, node: ir.Node, mark: Mark) -> list[ir.Node]:
    """Clip(x, low, high) -> Min(Max(x, lows), highs), with a bound for each channel."""
    current, old = node.inputs[0], node.outputs[0]
    dtype = old.dtype or ir.DataType.FLOAT
    new: list[ir.Node] = []
    for op, bound in (("Max", _bound(node, 1)), ("Min", _bound(node, 2))):
        if np.isfinite(bound):
            limit = _register(graph, f"{old.name}_{op.lower()}", np.full(mark.labels.shape, bound), dtype)
            new.append(ir.node(op, [current, limit]))
            current = new[-1].outputs[0]
            current.name, current.type, current.shape = f"{limit.name}_out", old.type, old.shape
            graph.insert_before(node, new[-1])
    assert current is not None
    name = old.name
    old.replace_all_uses_with(current)
    graph.remove(node, safe=True)
    old.name, current.name = f"{name}_before", name
    return new


def _bound(node: ir.Node, index: int) -> float:
    name, infinite = ("min", -np.inf) if index == 1 else ("max", np.inf)
    if name in node.attributes:
        return node.attributes[name].as_float()
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return infinite if tensor is None else float(tensor.numpy().reshape(()))


def _through_weight(node: ir.Node, d: Floats) -> Floats:
    """What a shift d of a layer's input adds to its output, per output channel."""
    weight = node.inputs[1]
    assert weight is not None
    constant = resolve(weight)
    assert constant is not None
    array = read(constant.value)
    array = array.T if constant.transposed else array
    if node.op_type == "MatMul":
        return d @ array
    if node.op_type == "Gemm":
        alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        return alpha * (array @ d if transposed else d @ array)
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    taps = array.reshape(*array.shape[:2], -1).sum(-1)
    return np.einsum("goi,gi->go", taps.reshape(groups, -1, taps.shape[1]), d.reshape(groups, -1)).reshape(-1)


def _new_bias(graph: ir.Graph, node: ir.Node, size: int) -> ir.Value:
    """Give a layer that has none a bias of zeros."""
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    bias = _register(graph, f"{node.outputs[0].name}_bias", np.zeros(size), dtype)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)
    return bias


def _bias_of(graph: ir.Graph, node: ir.Node, size: int) -> ir.Value:
    """The bias that a layer's output gets: its own, the constant of the Add behind it, or a new one."""
    if node.op_type != "MatMul":
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return _new_bias(graph, node, size)
        return _own(graph, node, 2)
    found = bias_add(node)
    if found is not None:
        return _own(graph, *found)
    out = node.outputs[0]
    bias = _register(graph, f"{out.name}_bias", np.zeros(size), out.dtype or ir.DataType.FLOAT)
    addition = ir.node("Add", [out, bias])
    new, name = addition.outputs[0], out.name
    new.type, new.shape = out.type, out.shape
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    addition.replace_input_with(0, out)
    graph.insert_after(node, addition)
    out.name, new.name = f"{name}_before_bias", name
    return bias


def _own(graph: ir.Graph, node: ir.Node, index: int) -> ir.Value:
    """The constant at an operand, private to it."""
    value = node.inputs[index]
    assert value is not None
    if len(list(value.uses())) == 1 and not value.is_graph_output():
        return value
    assert value.const_value is not None
    copy = _register(graph, f"{value.name}_own", value.const_value.numpy(), value.const_value.dtype)
    node.replace_input_with(index, copy)
    return copy
