"""What passes that cut matrices into panels have in common: what can be cut, which are cut alike, and the order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.panels import is_plain
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.passes.transform.panel_graph import cut_product, gather_columns, split_value

Order = npt.NDArray[np.intp]


def uncut(site: Site, least: int) -> str | None:
    """Why a site's matrix cannot be cut, or has fewer columns than it should; None if it can be."""
    if site.op not in ("MatMul", "Gemm"):
        return f"the columns of a {site.op} are not cut"
    if len(site.users) > 1:
        return f"its weight is used by {len(site.users)} operations"
    if not is_plain(site):
        return "it is no single matrix that is read as it is stored"
    if site.branch:
        return "it has a low-rank correction beside it"
    if site.columns < least:
        return f"it has {site.columns} columns only"
    if site.activation is None or site.activation.shape is None or site.weight.is_graph_output():
        return "the shape of its input is unknown, or its weight is an output"
    return None


def by_value(sites: Iterable[Site]) -> dict[ir.Value, list[Site]]:
    """Sites that can be cut, by the value that they read: these are cut alike."""
    readers: dict[ir.Value, list[Site]] = {}
    for site in sites:
        assert site.activation is not None
        readers.setdefault(site.activation, []).append(site)
    return readers


def source_of(group: Sequence[Site]) -> ir.Value:
    """What a group reads now; cutting what comes before may have put another value there."""
    value = group[0].node.inputs[0]
    assert value is not None
    return value


def absorbed(model: Model, order: Order, group: Sequence[Site]) -> str:
    """How an order of the columns of a group's matrices comes about.

    Returns:
        "natural" if it is there already; "folded" if what produces the value has absorbed it, which is done then and
        moves no columns of other matrices; "gather" if it can only be had by sorting the value.
    """
    if not (np.diff(order) < 0).any():
        return "natural"
    fold = find_fold(model.ir, source_of(group), "permute")
    if not isinstance(fold, Fold) or {edit.node for edit in fold.readers if edit.is_weight} - {s.node for s in group}:
        return "gather"
    try:
        fold.permute(order)
    except BadOption:  # it moves a channel that is fixed, or to another head
        return "gather"
    return "folded"


def cut_alike(
    model: Model, group: Sequence[Site], sizes: Sequence[int], gathered: Order | None = None, high: int = 0
) -> None:
    """Cut the matrices of a group.

    Args:
        model: whose graph is changed.
        group: sites that read one value.
        sizes: columns of the panels.
        gathered: an order to sort the value by at run time.
        high: how many panels, from the first, are marked as those that need more precision.
    """
    value = source_of(group)
    source = value if gathered is None else gather_columns(model.graph, value, gathered, group)
    parts = split_value(model.graph, source, sizes, [site.node for site in group])
    for site in group:
        cut_product(model.graph, site, parts, high)
