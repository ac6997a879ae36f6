"""Default schedules of operations that stay in float: threads outside, contiguous loops inside.

Relax's CPU pipeline leaves every operation as serial loops in the order of its definition. Here chains of
elementwise blocks are inlined, the outer loops run in parallel, and a reduction whose operands are contiguous
along the last output axis (products, convolutions) gets that axis innermost, where LLVM vectorises it.
Schedules tuned for single operations belong in front of this rule.
"""

from __future__ import annotations

from typing import Any

import tvm.ir.transform

from qcompiler.backends.tvm.tvm_api import s_tir, tirx

SPATIAL, REDUCTION = 0, 2
LANES = 16
_REFUSED = (ValueError, RuntimeError)  # ScheduleError is a RuntimeError


def schedule_pass() -> Any:
    """The rule as a TVM pass over a module."""
    return tvm.ir.transform.module_pass(_schedule_module, opt_level=0, name="QcompilerSchedule")


def _schedule_module(module: Any, _context: Any) -> Any:
    """Schedule every function that has blocks; one that the rule doesn't fit stays as it is."""
    for name, function in list(module.functions_items()):
        if isinstance(function, tirx.PrimFunc):
            module[name] = schedule_function(function)
    return module


def schedule_function(function: Any) -> Any:
    """The scheduled function, or the function itself where nothing can be done."""
    try:
        schedule = s_tir.Schedule(function)
        root = schedule.get_sblock("root")
        _inline(schedule, root)
        for block in schedule.get_child_blocks(root):
            _schedule_block(schedule, block)
    except _REFUSED:
        return function
    return schedule.mod["main"].with_attrs(function.attrs)


def _inline(schedule: Any, root: Any) -> None:
    """Inline elementwise blocks into elementwise consumers: no intermediate array is written."""
    for block in schedule.get_child_blocks(root):
        consumers = schedule.get_consumers(block)
        if not consumers or not all(_is_spatial(schedule, b) for b in (block, *consumers)):
            continue
        try:
            schedule.compute_inline(block)
        except _REFUSED:
            continue


def _is_spatial(schedule: Any, block: Any) -> bool:
    return all(int(v.iter_type) == SPATIAL for v in schedule.get(block).iter_vars)


def _schedule_block(schedule: Any, block: Any) -> None:
    variables = list(schedule.get(block).iter_vars)
    loops = list(schedule.get_loops(block))
    kinds = [int(v.iter_type) for v in variables]
    if len(loops) != len(kinds) or not set(kinds) <= {SPATIAL, REDUCTION} or SPATIAL not in kinds:
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    if not reduction:
        _elementwise(schedule, spatial)
        return
    last = [v for v in variables if int(v.iter_type) == SPATIAL][-1]
    inner = [spatial[-1]] if len(spatial) > 1 and _is_contiguous_along(schedule.get(block), last.var) else []
    outer = spatial[: len(spatial) - len(inner)]
    schedule.reorder(*outer, *reduction, *inner)
    schedule.decompose_reduction(block, reduction[0])
    schedule.parallel(schedule.fuse(*outer))


def _elementwise(schedule: Any, spatial: list[Any]) -> None:
    *outer, inner = spatial
    extent = schedule.get(inner).extent
    if isinstance(extent, tirx.IntImm) and int(extent) % LANES == 0:
        split, lanes = schedule.split(inner, [None, LANES])
        schedule.vectorize(lanes)
        outer.append(split)
    elif not outer:
        outer.append(inner)
    schedule.parallel(schedule.fuse(*outer))


def _is_contiguous_along(block: Any, variable: Any) -> bool:
    """Whether an operand's last index moves with this variable."""
    last = [region.region[-1].min for region in block.reads if len(region.region) > 0]
    return any(variable.same_as(v) for index in last for v in tirx.analysis.undefined_vars(index, []))
