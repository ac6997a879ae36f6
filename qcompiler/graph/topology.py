"""Views of a graph that planning and transforms need: ties between sites, residual streams, networkx.

All of them follow the wiring only; names mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir
from networkx.utils import UnionFind

from qcompiler.graph.sites import Site, find_sites

# Operations that hand on the numbers that they get; the same stream before and after.
_SAME = frozenset({"Identity", "Dropout", "Cast"})
_RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
_ACTIVATIONS = frozenset(
    {"MaxPool", "Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Sigmoid", "HardSigmoid", "Gelu"}
)


def to_networkx(model: ir.Model) -> nx.MultiDiGraph[ir.Node]:
    """The main graph: an edge for every use of a node's output, with the `ir.Value` as attribute "value"."""
    graph: nx.MultiDiGraph[ir.Node] = nx.MultiDiGraph()
    graph.add_nodes_from(model.graph)
    for node in model.graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                graph.add_edge(producer, node, value=value)
    return graph


def tie_groups(model: ir.Model, sites: Sequence[Site], *, add_inputs: bool = False) -> list[tuple[str, ...]]:
    """Sites whose activations must be quantized alike, as groups of two names or more.

    Sites that read one value are tied: there is one tensor, hence one way to quantize it (query, key and
    value; gate and up). With `add_inputs` the sites that write the operands of one Add are tied too, through
    bias, activation and reshaping: integer kernels add tensors of one format.

    Args:
        model: the model of the sites.
        sites: as `find_sites` gives them, or a part.
        add_inputs: also tie what is added.

    Returns:
        Groups in topological order of their first site, names in topological order.
    """
    ties: UnionFind[object] = UnionFind()
    for site in sites:
        ties.union(site.name, *site.activations)
    if add_inputs:
        for names in _added(model, sites):
            ties.union(*names)
    groups: dict[object, list[str]] = {}
    for site in sites:
        groups.setdefault(ties[site.name], []).append(site.name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _added(model: ir.Model, sites: Sequence[Site]) -> Iterable[list[str]]:
    """For every sum, the sites that write its terms, through bias, activation and reshaping."""
    sums: UnionFind[ir.Value] = UnionFind()
    for node in model.graph:
        if node.domain == "" and node.op_type in _SAME | _RESHAPING | _ACTIVATIONS:
            sums.union(node.outputs[0], *_dynamic(node)[:1])
        elif node.domain == "" and node.op_type in ("Add", "Sum"):
            sums.union(node.outputs[0], *_dynamic(node))
    writers: dict[ir.Value, list[str]] = {}
    for site in sites:
        for user in site.users:
            writers.setdefault(sums[user.outputs[0]], []).append(site.name)
    return writers.values()


@dataclass(frozen=True)
class ResidualStream:
    """An equivalence class of values that are sums of one another.

    Attributes:
        values: in topological order.
        writers: nodes that produce terms of the sums.
        readers: nodes that consume the sums.
    """

    values: tuple[ir.Value, ...]
    writers: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]


def residual_streams(model: ir.Model) -> list[ResidualStream]:
    """The residual streams, longest first: values joined by additions, and by Identity and Cast.

    Only streams into which a site writes are listed; sums inside an attention (masks, rotary embeddings)
    are not streams.
    """
    links: nx.Graph[ir.Value] = nx.Graph()
    sums: set[ir.Value] = set()
    for node in model.graph:
        operands = list(_stream_operands(node))
        links.add_edges_from((operand, node.outputs[0]) for operand in operands)
        if len(operands) > 1:
            sums.add(node.outputs[0])
    linear = {user for site in find_sites(model) for user in site.users}
    order = {node: position for position, node in enumerate(model.graph)}
    streams = [_stream(values, order) for values in nx.connected_components(links) if values & sums]
    return sorted((s for s in streams if linear & set(s.writers)), key=lambda s: -len(s.values))


def _stream_operands(node: ir.Node) -> Iterator[ir.Value]:
    if node.domain == "" and node.op_type in {"Add", "Sum"} | _SAME:
        for value in _dynamic(node):
            if node.op_type in _SAME or _same_width(value, node.outputs[0]):
                yield value


def _stream(values: Iterable[ir.Value], order: dict[ir.Node, int]) -> ResidualStream:
    members = set(values)

    def place(value: ir.Value) -> int:
        producer = value.producer()
        return -1 if producer is None else order.get(producer, -1)

    ordered = tuple(sorted(members, key=place))
    producers = (p for v in ordered if (p := v.producer()) is not None)
    writers = tuple(p for p in producers if not members & set(_stream_operands(p)))
    users = dict.fromkeys(user for v in ordered for user in v.consumers())
    return ResidualStream(ordered, writers, tuple(u for u in users if not members & set(u.outputs)))


def _dynamic(node: ir.Node) -> list[ir.Value]:
    """The inputs that are no constants."""
    return [v for v in node.inputs if v is not None and v.const_value is None]


def _same_width(a: ir.Value, b: ir.Value) -> bool:
    """A broadcast over leading axes is still a term of the sum (position embeddings)."""
    if not a.shape or not b.shape:
        return False
    return a.shape[-1] == b.shape[-1]
