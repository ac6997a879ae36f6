"""Products that are added up, and matrices that are cut into panels of columns: seen in the wiring, not in names.

A matrix W = [W_0 W_1 ...] whose input is cut alike computes W x = W_0 x_0 + W_1 x_1 + ...: a Split, a product a panel
and Adds. To everything that looks at sites each panel is one. Here is how to see what belongs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph.sites import Site

PRECISION, HIGH = "qcompiler.precision", "high"  # key and value of `metadata_props` of a panel's node


@dataclass(frozen=True, eq=False)
class Sum:
    """Products of sites that are added up, and nothing else with them.

    Attributes:
        sites: whose outputs are the terms, from left to right.
        adds: the additions, first to last; the last one yields `output`.
        output: W_0 x_0 + W_1 x_1 + ...
    """

    sites: tuple[Site, ...]
    adds: tuple[ir.Node, ...]
    output: ir.Value


@dataclass(frozen=True, eq=False)
class Cut:
    """A matrix in panels: a sum whose terms read the parts of one Split of the last axis, in order.

    Attributes:
        sum: the products.
        split: the node whose outputs they read.
    """

    sum: Sum
    split: ir.Node

    @property
    def value(self) -> ir.Value:
        """What is split: the input of the whole matrix."""
        assert self.split.inputs[0] is not None
        return self.split.inputs[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Columns of the panels."""
        return tuple(site.columns for site in self.sum.sites)


def is_high(site: Site) -> bool:
    """Whether a transform has put into this panel what needs more precision than the rest."""
    return site.node.metadata_props.get(PRECISION) == HIGH


def find_sums(graph: ir.Graph, sites: Sequence[Site]) -> list[Sum]:
    """Every sum of two products or more, each as large as it can be, in topological order.

    Only the outputs of plain products count (MatMul and Gemm with one matrix, used once, of one scale): so no term can
    depend on another, and the error of one can be made up for by the others.
    """
    own = {site.node: site for site in sites if is_plain(site)}
    found: list[Sum] = []
    taken: set[ir.Node] = set()
    for node in reversed(list(graph)):
        if node in taken or not _is_add(node):
            continue
        terms = _terms(node, own)
        if terms is not None and _like(terms[0]):
            taken.update(terms[1])
            found.append(Sum(tuple(terms[0]), tuple(terms[1]), node.outputs[0]))
    return found[::-1]


def find_cuts(graph: ir.Graph, sites: Sequence[Site]) -> list[Cut]:
    """Every matrix that lies in panels, in topological order."""
    return [cut for found in find_sums(graph, sites) if (cut := _as_cut(found)) is not None]


def is_plain(site: Site) -> bool:
    """Whether the site is one matrix that one MatMul or Gemm multiplies, read as it is stored."""
    single = len(site.users) == 1 and len(site.shape) == 2 and site.op in ("MatMul", "Gemm")
    return single and site.node.inputs[1] is site.weight


def _is_add(node: ir.Node) -> bool:
    return node.op_type == "Add" and node.domain == ""


def _terms(node: ir.Node, own: dict[ir.Node, Site]) -> tuple[list[Site], list[ir.Node]] | None:
    """Sites and additions below an Add; None if it adds anything else."""
    sites: list[Site] = []
    adds: list[ir.Node] = []
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if value is None or producer is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if producer in own:
            sites.append(own[producer])
            continue
        below = _terms(producer, own) if _is_add(producer) else None
        if below is None:
            return None
        sites += below[0]
        adds += below[1]
    return sites, [*adds, node]


def _like(sites: Sequence[Site]) -> bool:
    """Whether the products are of one kind, so that their matrices side by side are one matrix."""

    def kind(site: Site) -> tuple[object, ...]:
        alpha = site.node.attributes.get("alpha")
        return site.op, site.rows, site.layout, 1.0 if alpha is None else alpha.as_float()

    return len({kind(site) for site in sites}) == 1


def _as_cut(found: Sum) -> Cut | None:
    values = [site.activation for site in found.sites]
    split = values[0].producer() if values[0] is not None else None
    if split is None or split.op_type != "Split" or tuple(split.outputs) != tuple(values):
        return None
    axis = split.attributes.get("axis")
    shape = split.inputs[0].shape if split.inputs[0] is not None else None
    last = shape is not None and axis is not None and axis.as_int() % len(shape) == len(shape) - 1
    return Cut(found, split) if last else None
