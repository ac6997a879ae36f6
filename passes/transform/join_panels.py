"""The inverse of `split-panels`, wherever allocation made no use of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.graph.panels import Cut, find_cuts, is_plain
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.passes.transform.panel_graph import (
    cut_product,
    is_order,
    join_product,
    remove_unread,
    split_value,
    undo_gather,
    whole_name,
)
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.plan import Plan
from qcompiler.progress import Progress

_Fate = tuple[object, ...]  # equal for panels that are stored alike


@dataclass(frozen=True)
class JoinPanels(Pass):
    """Make one panel of neighbouring panels of a matrix that got the same plan, and rename the plan's entries.

    A matrix whose panels all agree is what it was before it was cut. If none of the matrices that read a sorted value
    is cut any more, they get their columns back in the old order, and the Gather goes.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT

    def requires(self, model: Model) -> None:
        """Float weights: codes are fixed to what is a site."""
        if model.lowered or model.weights:
            raise PassRefused("the weights are rounded already", model.name, "put 'join-panels' before rounding")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Join; metrics hold the sizes of the panels that are left, by the name of the matrix."""
        del progress
        cuts = find_cuts(model.graph, find_sites(model.ir))
        joined = [cut for cut in cuts if any(a == b for a, b in pairwise(_fates(model.plan, cut)))]
        wholes = {join_product(cut): cut for cut in joined}
        sites = [site for site in find_sites(model.ir) if site.node in wholes]
        again: dict[str, list[int]] = {}
        for site in sites:
            cut = wholes[site.node]
            runs = _runs(_fates(model.plan, cut), cut.sizes)
            names = [f"{site.name}.panel{place}" for place in range(len(runs))] if len(runs) > 1 else [site.name]
            model.plan = _renamed(model.plan, cut, [first for first, _ in runs], names)
            if len(runs) > 1:
                again[site.name] = [size for _, size in runs]
        _cut_again(model.graph, [site for site in sites if site.name in again], again)
        gathers = _tidy(model, dict.fromkeys(cut.split for cut in joined))
        left = {whole_name(cut): list(cut.sizes) for cut in find_cuts(model.graph, find_sites(model.ir))}
        metrics = {"panels": left, "gathers_undone": gathers}
        return PassReport(self.registered_name(), len(joined), metrics=metrics)


def _fates(plan: Plan, cut: Cut) -> list[_Fate]:
    """What the plan says about each panel."""
    return [(plan.sites.get(site.name), site.name in plan.kept) for site in cut.sum.sites]


def _runs(fates: Sequence[_Fate], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours that agree: (place of the first of them, columns of all of them)."""
    runs: list[tuple[int, int]] = []
    for place, size in enumerate(sizes):
        if place and fates[place] == fates[place - 1]:
            runs[-1] = runs[-1][0], runs[-1][1] + size
        else:
            runs.append((place, size))
    return runs


def _renamed(plan: Plan, cut: Cut, firsts: Sequence[int], names: Sequence[str]) -> Plan:
    """The plan with one entry a run, taken from its first panel, in place of those of the panels."""
    old = [site.name for site in cut.sum.sites]
    entries = {n: plan.sites[old[first]] for n, first in zip(names, firsts, strict=True) if old[first] in plan.sites}
    kept = [n for n, first in zip(names, firsts, strict=True) if old[first] in plan.kept]
    sites = {name: entry for name, entry in plan.sites.items() if name not in old} | entries
    return replace(plan, sites=sites, kept=(*(name for name in plan.kept if name not in old), *kept))


def _cut_again(graph: ir.Graph, sites: Iterable[Site], sizes: Mapping[str, Sequence[int]]) -> None:
    """Cut matrices into fewer panels than they had; those that are cut alike share a Split."""
    alike: dict[tuple[ir.Value | None, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        alike.setdefault((site.node.inputs[0], tuple(sizes[site.name])), []).append(site)
    for (value, lengths), group in alike.items():
        assert value is not None
        parts = split_value(graph, value, lengths, [site.node for site in group])
        for site in group:
            cut_product(graph, site, parts)


def _tidy(model: Model, splits: Iterable[ir.Node]) -> int:
    """Remove Splits that nothing reads, and the Gathers before them that nobody needs; how many of these."""
    sources: dict[ir.Node, None] = {}
    for split in splits:
        source = split.inputs[0].producer() if split.inputs[0] is not None else None
        if source is not None and is_order(source):
            sources[source] = None
        if not any(value.uses() for value in split.outputs):
            remove_unread(split)
    plain = {site.node: site for site in find_sites(model.ir) if is_plain(site)}
    undone = 0
    for gather in sources:
        readers = list(gather.outputs[0].uses())
        if all(node in plain and index == 0 for node, index in readers) and not gather.outputs[0].is_graph_output():
            undo_gather(gather, [plain[node] for node, _ in readers])
            undone += 1
    return undone
