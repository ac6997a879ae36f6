"""Shapes of values as a sample makes them, whatever the model leaves open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.sites import Site
from qcompiler.measure.runner import Runner

_ENDING = "/qcompiler_shape"


def site_shapes(
    model: ir.Model, sites: Iterable[Site], feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the sites' operations read (beside the weights) and write, by the names of the values.

    Args:
        model: the float graph that the sites were found in; it is not changed.
        sites: whose operations.
        feeds: inputs of one run, which is made.
    """
    values: dict[ir.Value, None] = {}
    for node in (user for site in sites for user in site.users):
        data = node.inputs[1 if node.op_type == "Gather" else 0]
        values |= dict.fromkeys(v for v in (data, *node.outputs) if v is not None)
    return value_shapes(model, [str(value.name) for value in values], feeds)


def value_shapes(
    model: ir.Model, names: Iterable[str], feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of values of the main graph in one run; the values themselves are not kept."""
    copy, wanted = model.clone(), set(names)
    graph = copy.graph
    found = {v.name: v for v in (*graph.inputs, *graph.initializers.values()) if v.name in wanted}
    found |= {v.name: v for node in graph for v in node.outputs if v.name in wanted}
    made: list[str] = []
    for name, value in found.items():
        node = ir.node("Shape", [value], name=f"{name}{_ENDING}")
        node.outputs[0].name = f"{name}{_ENDING}"
        graph.append(node)
        made.append(f"{name}{_ENDING}")
    shapes = Runner(copy, outputs=made)(feeds)
    return {name.removesuffix(_ENDING): tuple(int(d) for d in shape) for name, shape in shapes.items()}
