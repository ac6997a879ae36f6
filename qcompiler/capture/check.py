"""What has to hold for a parsed model proto before anything trusts it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx

from qcompiler.errors import BadModel

OPSETS = range(11, 27)  # what onnx's converter brings to opset 21 or ONNX Runtime runs as it is
_CONTEXT_OPS = {"EPContext"}  # a node that makes ONNX Runtime load a compiled binary named by the model


def check_structure(model: onnx.ModelProto, where: str) -> None:
    """Versions, names, references and cycles of the whole model.

    Raises:
        BadModel: at the first fault found, naming the node or value.
    """
    _check_versions(model, where)
    graph = model.graph
    if not graph.output or not graph.node:
        raise BadModel("the graph has no nodes or no outputs: there is nothing to compile", where)
    if graph.sparse_initializer:
        raise BadModel("holds sparse initializers, which are not supported", where, "store the weights densely")
    _check_functions(model, where)
    _check_graph(graph, frozenset(), where)


def _check_versions(model: onnx.ModelProto, where: str) -> None:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions:
        raise BadModel("not an ONNX model: it names no operator set", where)
    if len(set(versions)) > 1 or versions[0] not in OPSETS:
        raise BadModel(
            f"uses ONNX opset {', '.join(map(str, versions))}",
            where,
            f"export the model with an opset between {OPSETS[0]} and {OPSETS[-1]}",
        )


def _check_functions(model: onnx.ModelProto, where: str) -> None:
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for function in model.functions:
        key = (function.domain, function.name)
        if key in calls:
            raise BadModel(f"function '{function.name}' is defined twice", where)
        calls[key] = {(n.domain, n.op_type) for n in _nodes(function.node)}
        _check_nodes(function.node, set(function.input), where)
    _acyclic(calls, where, "functions call each other in a circle")


def _acyclic(graph: dict[tuple[str, str], set[tuple[str, str]]], where: str, what: str) -> None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        names = " -> ".join(name for _, name in error.args[1][:6])
        raise BadModel(f"{what} ({names})", where) from error


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _nodes(graph.node)


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    found: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found += attribute.graphs
    return found


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> None:
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    for names, what in ((inputs, "input"), (initializers, "initializer")):
        _unique(names, what, where)
    if any(not name for name in inputs + initializers):
        raise BadModel("an input or initializer has no name", where)
    known = _check_nodes(graph.node, set(inputs) | set(initializers), where, outer)
    for output in graph.output:
        if output.name not in known | outer:
            raise BadModel(f"output '{output.name}' is computed by no node", where)
    _unique([o.name for o in graph.output], "output", where)


def _unique(names: list[str], what: str, where: str) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadModel(f"{what} '{name}' is defined twice", where)
        seen.add(name)


def _check_nodes(
    nodes: Sequence[onnx.NodeProto], defined: set[str], where: str, outer: frozenset[str] = frozenset()
) -> set[str]:
    """Check that every value is computed once and none needs itself; return all names of this graph."""
    producer = _producers(nodes, defined, where)
    known = defined | set(producer)
    visible = frozenset(known | outer)
    needs: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for index, node in enumerate(nodes):
        used = [name for name in node.input if name]
        missing = next((name for name in used if name not in visible), None)
        if missing is not None:
            raise BadModel(f"node '{_label(nodes, index)[1]}' reads '{missing}', which nothing computes", where)
        for graph in _subgraphs(node):
            _check_graph(graph, visible, where)
        needs[_label(nodes, index)] = {_label(nodes, producer[name]) for name in used if name in producer}
    _acyclic(needs, where, "nodes need each other's outputs in a circle")
    return known


def _producers(nodes: Sequence[onnx.NodeProto], defined: set[str], where: str) -> dict[str, int]:
    """Value name -> index of the node that computes it."""
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node.op_type in _CONTEXT_OPS:
            raise BadModel(
                f"node '{_label(nodes, index)[1]}' is an {node.op_type}, a compiled binary",
                where,
                "compile the original model",
            )
        for name in filter(None, node.output):
            if name in producer or name in defined:
                raise BadModel(f"value '{name}' is computed twice", where)
            producer[name] = index
    return producer


def _label(nodes: Sequence[onnx.NodeProto], index: int) -> tuple[str, str]:
    return (str(index), nodes[index].name or f"{nodes[index].op_type}_{index}")
