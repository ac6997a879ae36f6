"""Orthogonal matrices within blocks of channels that only linear operations lie between: heads, or all of them.

The labels of a region say where every channel goes. Channels that live in the same attention heads form a block, and
what holds for a permutation within a head holds for any orthogonal matrix there, as long as nothing but linear
operations is crossed (kind "rotate" of a fold). With grouped heads a block of the values lies several times in what
the output projection reads, once for each query head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.folds import apply
from qcompiler.graph.folds.labels import Labels
from qcompiler.graph.folds.region import Edit, Region, label
from qcompiler.graph.folds.rewrite import commit, read

Floats = npt.NDArray[np.float64]


def find_blocks(region: Region, start: Labels) -> tuple[tuple[Labels, ...], str]:
    """The blocks of a started value, and a reason if there are none.

    Returns:
        For each block int64 [times, size]: the channels of the started value, a row for every time that it is there.
    """
    line = region.classes.roots(start).reshape(-1)
    homes, broken = _homes(region)
    fixed = {**region.classes.pinned(), **dict.fromkeys(broken, "channels of one head are tied")}
    groups: dict[frozenset[tuple[int, int]], list[int]] = {}
    for root in dict.fromkeys(line.tolist()):
        if root not in fixed:
            groups.setdefault(frozenset(homes.get(root, ())), []).append(root)
    found: list[Labels] = []
    reason = next((text for root, text in fixed.items() if root in line), "all its channels are tied")
    for roots in groups.values():
        refused = next((r for e in region.edits.values() if (r := _unfit(region, e, roots)) is not None), None)
        here = places(line, roots)
        if len(roots) > 1 and refused is None and here is not None:
            found.append(here)
        reason = refused or reason
    return tuple(found), reason


def rotate(
    model: ir.Model, region: Region, start: Labels, blocks: Sequence[Labels], matrices: Sequence[Floats]
) -> None:
    """Every row of a block of the started value is multiplied by the block's matrix from the right."""
    changes: dict[ir.Value, Floats] = {}
    for edit in apply.own_edits(model.graph, region):
        value = edit.constant.value
        array = changes.get(value, read(value))
        axis, found = places_of(region, start, blocks, edit)
        moved = np.moveaxis(array.copy(), axis, 0)
        for number, here in found:
            moved[here] = np.tensordot(matrices[number], moved[here], ([0], [0]))
        changes[value] = np.moveaxis(moved, 0, axis)
    commit(changes)


def places_of(
    region: Region, start: Labels, blocks: Sequence[Labels], edit: Edit
) -> tuple[int, list[tuple[int, Labels]]]:
    """Where a constant holds the channels of blocks.

    Returns:
        The axis along which it holds them; and for every time that it holds one the number of the block and its places,
        int64 [size].
    """
    line = region.classes.roots(start).reshape(-1)
    axis, own = _line(region, edit)
    here, found = set(own.tolist()), list[tuple[int, Labels]]()
    for number, block in enumerate(blocks):
        roots = line[block[0]].tolist()
        table = places(own, roots) if set(roots) <= here else None
        found += [] if table is None else [(number, row) for row in table]
    return axis, found


def places(line: Labels, roots: Sequence[int]) -> Labels | None:
    """int64 [times, size]: where a line of labels has these roots; None unless it has them as equal copies."""
    found = [np.flatnonzero(line == root) for root in roots]
    if len({len(where) for where in found}) != 1:
        return None
    table = np.stack(found, 1)
    steps = table - table[:, :1]
    return table if np.array_equal(steps, np.broadcast_to(steps[:1], steps.shape)) else None


def _homes(region: Region) -> tuple[Mapping[int, set[tuple[int, int]]], set[int]]:
    """For every root the heads that it is in; and the roots of heads in which channels are tied."""
    homes: dict[int, set[tuple[int, int]]] = {}
    broken: set[int] = set()
    for number, (labels, heads) in enumerate(region.blocks):
        seen: dict[int, list[int]] = {}
        for root, head in zip(
            region.classes.roots(labels).reshape(-1).tolist(), heads.reshape(-1).tolist(), strict=True
        ):
            homes.setdefault(root, set()).add((number, head))
            seen.setdefault(head, []).append(root)
        broken |= {root for roots in seen.values() if len(set(roots)) < len(roots) for root in roots}
    return homes, broken


def _line(region: Region, edit: Edit) -> tuple[int, Labels]:
    """The axis along which the labels of a constant differ, and the roots along it; of one that has none, axis 0."""
    roots = region.classes.roots(edit.labels)
    axis = next((k for k, size in enumerate(roots.shape) if size > 1), 0)
    return axis, roots.reshape(-1) if roots.ndim else roots.reshape(1)


def _unfit(region: Region, edit: Edit, roots: Sequence[int]) -> str | None:
    """Why a constant cannot absorb the rotation of a block that it carries."""
    own = region.classes.roots(edit.labels)
    if not np.isin(own, roots).any():
        return None
    axes = [k for k, size in enumerate(own.shape) if size > 1]
    if len(axes) != 1 or edit.constant.offset:
        return f"the constant at {label(edit.node)} has no axis for the channels"
    if places(own.reshape(-1), roots) is None:
        return f"{label(edit.node)} reads a part of the channels of a head"
    return None
