"""The surgery of panels: sort the columns behind a value, cut a matrix, put one together again.

What a matrix was called before it was cut lies in the metadata of its panels' nodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.panels import HIGH, PRECISION, Cut
from qcompiler.graph.sites import Site

Order = npt.NDArray[np.int64]
_WHOLE = "qcompiler.whole"
_SCOPES = "pkg.torch.onnx.name_scopes"  # sites are named after it: only a whole matrix may have it


def gather_columns(graph: ir.Graph, value: ir.Value, order: Order, sites: Sequence[Site]) -> ir.Value:
    """Let sites read a value through one Gather that sorts its last axis, and their columns with it."""
    index = _constant(graph, f"{value.name}.order", order.astype(np.int32))
    sorted_value = ir.val(_fresh(graph, f"{value.name}.sorted"), dtype=value.dtype, shape=value.shape)
    axis = {"axis": len(value.shape or ()) - 1}
    gather = ir.node("Gather", [value, index], axis, name=sorted_value.name, outputs=[sorted_value])
    _first(graph, [site.node for site in sites], gather)
    for site in sites:
        site.node.replace_input_with(0, sorted_value)
        take_columns(site, order)
    return sorted_value


def undo_gather(gather: ir.Node, sites: Sequence[Site]) -> None:
    """The inverse of `gather_columns`; the sites must be all that reads the sorted value."""
    value, index = gather.inputs[0], gather.inputs[1]
    assert index is not None
    assert index.const_value is not None
    back = np.argsort(index.const_value.numpy())
    for site in sites:
        site.node.replace_input_with(0, value)
        take_columns(site, back)
    remove_unread(gather)


def is_order(gather: ir.Node | None) -> bool:
    """Whether a node puts the last axis of a value into another order, by a constant."""
    if gather is None or gather.op_type != "Gather" or gather.domain != "" or gather.inputs[1] is None:
        return False
    shape, tensor = gather.outputs[0].shape, gather.inputs[1].const_value
    axis = gather.attributes.get("axis")
    if shape is None or tensor is None or axis is None or axis.as_int() % len(shape) != len(shape) - 1:
        return False
    return len(tensor.shape) == 1 and sorted(tensor.numpy().tolist()) == list(range(int(tensor.size)))


def take_columns(site: Site, order: npt.NDArray[np.intp] | Order) -> None:
    """Column c of a site's matrix becomes what column order[c] was."""
    tensor = site.weight.const_value
    assert tensor is not None
    moved = np.ascontiguousarray(np.take(tensor.numpy(), order, column_axis(site)))
    site.weight.const_value = ir.tensor(moved, name=site.weight.name)


def split_value(graph: ir.Graph, value: ir.Value, sizes: Sequence[int], readers: Iterable[ir.Node]) -> list[ir.Value]:
    """Cut the last axis of a value, in front of those that will read the parts."""
    assert value.shape is not None
    parts = [
        ir.val(
            _fresh(graph, f"{value.name}.part{place}"),
            dtype=value.dtype,
            shape=ir.Shape([*list(value.shape)[:-1], size]),
        )
        for place, size in enumerate(sizes)
    ]
    lengths = _constant(graph, f"{value.name}.parts", np.asarray(sizes, np.int64))
    axis = {"axis": len(value.shape) - 1}
    split = ir.node("Split", [value, lengths], axis, name=_fresh(graph, f"{value.name}.split"), outputs=parts)
    _first(graph, readers, split)
    return parts


def cut_product(graph: ir.Graph, site: Site, parts: Sequence[ir.Value], high: int = 0) -> None:
    """Put products of the parts of a site's input, and their sum, in place of its product.

    The first `high` of them are marked as those that need more precision (`panels.is_high`).
    """
    node, tensor = site.node, site.weight.const_value
    assert tensor is not None
    sizes = [int(part.shape[-1]) for part in parts if part.shape is not None]  # type: ignore[arg-type]
    pieces = np.split(tensor.numpy(), np.cumsum(sizes)[:-1], column_axis(site))
    facts = {"node": node.name, "weight": site.weight.name, "scopes": node.metadata_props.get(_SCOPES)}
    total: ir.Value | None = None
    for place, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
        weight = _constant(graph, f"{site.weight.name}.panel{place}", np.ascontiguousarray(piece))
        term = _product(node, part, weight, f"{site.name}.panel{place}", biased=place == 0)
        term.node.metadata_props[_WHOLE] = json.dumps(facts)
        if place < high:
            term.node.metadata_props[PRECISION] = HIGH
        graph.insert_before(node, term.node)
        total = term.value if total is None else _add(node, total, term.value, f"{site.name}.sum{place}")
    assert total is not None
    _replace(node, total)
    drop(graph, [site.weight])


def whole_name(cut: Cut) -> str:
    """What a matrix in panels is called where its panels are not meant one by one."""
    first = cut.sum.sites[0]
    return first.name.removesuffix(".panel0") if _WHOLE in first.node.metadata_props else first.name


def join_product(cut: Cut) -> ir.Node:
    """Put one product of the value that is split in place of panels and their sum; it is called what it was."""
    sites = cut.sum.sites
    node, last = sites[0].node, cut.sum.adds[-1]
    graph = _graph_of(node)
    tensors = [site.weight.const_value for site in sites]
    whole = np.concatenate([t.numpy() for t in tensors if t is not None], column_axis(sites[0]))
    facts = json.loads(node.metadata_props.get(_WHOLE, "{}"))
    weight = _constant(graph, str(facts.get("weight") or f"{sites[0].weight.name}.whole"), whole)
    term = _product(node, cut.value, weight, str(facts.get("node") or f"{node.name}.whole"), biased=True)
    for mark in (_WHOLE, PRECISION):
        term.node.metadata_props.pop(mark, None)
    if facts.get("scopes"):
        term.node.metadata_props[_SCOPES] = facts["scopes"]
    graph.insert_before(last, term.node)
    _replace(last, term.value)
    graph.remove([*cut.sum.adds[:-1], *(site.node for site in sites)], safe=True)
    drop(graph, [site.weight for site in sites])
    return term.node


def remove_unread(node: ir.Node) -> None:
    """Remove a node that nothing reads any more, with the constants that only it has read."""
    graph, inputs = _graph_of(node), [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    drop(graph, inputs)


def drop(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Remove those initializers among some values that nothing uses any more."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def column_axis(site: Site) -> int:
    """The axis of a plain product's weight tensor along which its columns lie."""
    return 0 if site.layout == "columns-first" else 1


@dataclass(frozen=True, eq=False)
class _Term:
    node: ir.Node
    value: ir.Value


def _product(like: ir.Node, data: ir.Value, weight: ir.Value, name: str, *, biased: bool) -> _Term:
    """A product of the same kind, not in the graph yet; its output has the type of the old one's."""
    bias = [v for v in like.inputs[2:] if v is not None] if biased else []
    out = _like(like, f"{name}.out")
    attributes = {key: ir.Attr(key, a.type, a.value) for key, a in like.attributes.items()}
    node = ir.node(like.op_type, [data, weight, *bias], attributes, name=name, outputs=[out])
    node.metadata_props.update({key: text for key, text in like.metadata_props.items() if key != _SCOPES})
    return _Term(node, out)


def _add(before: ir.Node, left: ir.Value, right: ir.Value, name: str) -> ir.Value:
    total = _like(before, f"{name}.out")
    _graph_of(before).insert_before(before, ir.node("Add", [left, right], name=name, outputs=[total]))
    return total


def _like(node: ir.Node, name: str) -> ir.Value:
    """A new value of the shape of a node's output."""
    old = node.outputs[0]
    return ir.val(_fresh(_graph_of(node), name), dtype=old.dtype, shape=old.shape)


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Let a value take the place, and the name, of a node's output; the node goes."""
    old = node.outputs[0]
    name = old.name
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    old.name = f"{name}.before"
    value.name = name
    _graph_of(node).remove(node, safe=True)


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    unique = _fresh(graph, name)
    value = ir.val(unique, const_value=ir.tensor(array, name=unique))
    graph.register_initializer(value)
    return value


def _fresh(graph: ir.Graph, name: str) -> str:
    """A name that no value and no node has."""
    taken = {v.name for node in graph for v in node.outputs} | set(graph.initializers) | {v.name for v in graph.inputs}
    taken |= {node.name for node in graph}
    return next(n for k in range(len(taken) + 1) if (n := f"{name}_{k}" if k else name) not in taken)


def _first(graph: ir.Graph, readers: Iterable[ir.Node], node: ir.Node) -> None:
    """Insert a node in front of the first of those that read it."""
    wanted = set(readers)
    graph.insert_before(next(n for n in graph if n in wanted), node)


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph
