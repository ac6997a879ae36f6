"""Where to cut a graph into a chain (see `segments`).

Nodes are of three kinds. *Constant* ones depend on initializers only and are repeated in every segment that
needs them. *Side* ones depend on the inputs but on no site (masks, position tables, scaled pixels): they run once,
at the start. All others form the *body*, which is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import onnx_ir as ir

from qcompiler.graph.panels import find_sums
from qcompiler.graph.sites import FLOATS, Site

_WIDEST = 4  # values that may cross a cut that is only made because a segment is too large


@dataclass(frozen=True)
class Part:
    """One segment, by names.

    Attributes:
        sites: whose first user is here.
        inputs: values from before that its nodes read.
        outputs: values made here that are needed later.
        before: all values that this or a later segment needs and that exist before this one.
        weights: initializers that its nodes depend on.
        made: everything that its nodes compute.
    """

    sites: tuple[Site, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    before: tuple[str, ...]
    weights: frozenset[str]
    made: frozenset[str]


@dataclass(frozen=True)
class Chain:
    """The parts, the values to begin with, and the outputs of the graph."""

    parts: tuple[Part, ...]
    start: tuple[str, ...]
    outputs: tuple[str, ...]


def divide(graph: ir.Graph, sites: Sequence[Site], max_live: int, most_sites: int) -> Chain:
    """Cut `graph` between `sites`; see `segments.Segments` for the arguments."""
    kinds = _Kinds(graph, sites)
    body = kinds.body
    cuts = _choose(
        _site_positions(body, sites), _within_sums(graph, body, sites), max_live, most_sites, _Liveness(kinds)
    )
    ends = [*cuts, len(body)]
    spans = list(zip([0, *cuts], ends, strict=True)) if body else []
    outputs = tuple(dict.fromkeys(_name(v) for v in graph.outputs))
    needed = set(outputs)
    first_use = {site.name: _first_position(body, site) for site in sites}
    parts: list[Part] = []
    for low, high in reversed(spans):
        nodes = body[low:high]
        made = {_name(v) for node in nodes for v in node.outputs if v.name}
        read = {_name(v) for node in nodes for v in reads(node) if v not in kinds.constant}
        here = tuple(site for site in sites if low <= first_use[site.name] < high)
        weights = frozenset(name for node in nodes for v in reads(node) for name in kinds.origins(v))
        out = tuple(sorted(made & needed))
        needed = (needed - made) | (read - made)
        parts.append(Part(here, tuple(sorted(read - made)), out, tuple(sorted(needed)), weights, frozenset(made)))
    return Chain(tuple(reversed(parts)), tuple(sorted(needed)), outputs)


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, those that its subgraphs capture included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        graphs: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)
            yield from (v for v in graph.outputs if v.graph is node.graph)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


class _Kinds:
    """Which values are constant, and which nodes form the body."""

    def __init__(self, graph: ir.Graph, sites: Sequence[Site]) -> None:
        users = {node for site in sites for node in site.users}
        moving: set[ir.Value] = set()
        self.body: list[ir.Node] = []
        self.constant: set[ir.Value] = set(graph.initializers.values())
        self._origins: dict[ir.Value, frozenset[str]] = {
            value: frozenset((name,)) for name, value in graph.initializers.items()
        }
        for node in graph:
            inputs = list(reads(node))
            if node in users or any(value in moving for value in inputs):
                self.body.append(node)
                moving.update(node.outputs)
            elif all(value in self.constant for value in inputs):
                self.constant.update(node.outputs)
                origin = frozenset(name for value in inputs for name in self._origins[value])
                self._origins.update(dict.fromkeys(node.outputs, origin))

    def origins(self, value: ir.Value) -> frozenset[str]:
        """The initializers that a constant value is made of; none for other values."""
        return self._origins.get(value, frozenset())


class _Liveness:
    """How many float values, and of what size, cross each gap of the body. Gap i lies before node i."""

    def __init__(self, kinds: _Kinds) -> None:
        body = kinds.body
        last: dict[ir.Value, int] = {}
        for position, node in enumerate(body):
            for value in reads(node):
                last[value] = position
        self.count = [0] * (len(body) + 1)
        self.size = [0] * (len(body) + 1)
        for position, node in enumerate(body):
            for value in node.outputs:
                if value in last and (value.dtype is None or value.dtype in FLOATS):
                    for gap in range(position + 1, last[value] + 1):
                        self.count[gap] += 1
                        self.size[gap] += _size(value)


def _size(value: ir.Value) -> int:
    """Elements for one sample, as far as known: symbolic dimensions count as 1."""
    return prod(int(d) for d in value.shape if isinstance(d, int)) if value.shape is not None else 1


def _first_position(body: Sequence[ir.Node], site: Site) -> int:
    users = set(site.users)
    return next(position for position, node in enumerate(body) if node in users)


def _site_positions(body: Sequence[ir.Node], sites: Sequence[Site]) -> list[int]:
    """Positions of all users of sites, in order."""
    users = {node for site in sites for node in site.users}
    return [position for position, node in enumerate(body) if node in users]


def _within_sums(graph: ir.Graph, body: Sequence[ir.Node], sites: Sequence[Site]) -> frozenset[int]:
    """Positions of sites behind which no cut may be: products that are added up are rounded together."""
    places = {node: position for position, node in enumerate(body)}
    spans = [[places[site.node] for site in found.sites] for found in find_sums(graph, sites)]
    return frozenset(position for span in spans for position in range(min(span), max(span)))


def _choose(
    positions: list[int], together: frozenset[int], max_live: int, most_sites: int, live: _Liveness
) -> list[int]:
    """Gaps to cut at: the narrowest between each two neighbouring sites, where it is narrow enough."""
    cuts: list[int] = []
    for first, second in pairwise(positions):
        if first in together:
            continue
        gap = min(range(first + 1, second + 1), key=lambda g: (live.count[g], live.size[g], g))
        if live.count[gap] <= max_live:
            cuts.append(gap)
    if max_live >= _WIDEST:
        return cuts
    edges = [-1, *cuts, len(live.count)]
    extra: list[int] = []
    for low, high in pairwise(edges):
        inside = [p for p in positions if low <= p < high]
        if len(inside) > most_sites:
            extra += _choose(inside, together, max_live + 1, most_sites, live)
    return sorted({*cuts, *extra})
