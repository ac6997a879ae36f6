"""InsertQDQ: commit plan, codes, ranges and bias corrections to the graph (docs/architecture.md, the QDQ contract)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.graph import functions
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.bias import add_to_bias, add_to_value
from qcompiler.passes.lower.stored_weight import store
from qcompiler.pipeline import Pass, PassReport
from qcompiler.plan import Plan
from qcompiler.progress import Progress

OLDEST_OPSET = 21  # blocked DequantizeLinear and INT4
OLDEST_IR = 10
INT2_IR = 13


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Replace weights by codes with DequantizeLinear, and put quantizers on the activations that the plan names.

    Float weights are released as they are replaced. Needs opset 21 and codes for every planned site.
    """

    stage: ClassVar[Literal["float", "lowering", "lowered"]] = "lowering"

    def requires(self, model: Model) -> None:
        """Refuse a model that is lowered already, planned but not rounded, or too old."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        opset = model.graph.opset_imports.get("", 0)
        if opset < OLDEST_OPSET:
            raise PassRefused(
                f"opset {opset} has no blocked DequantizeLinear", model.name, "convert the model to opset 21 or later"
            )
        missing = [n for n, p in model.plan.sites.items() if p.weight is not None and n not in model.weights]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise PassRefused(f"site '{missing[0]}'{more} planned but not rounded", model.name, "run a rounding pass")
        values = _values(model.graph)
        lost = [name for name in model.ranges if name not in values]
        if lost:
            raise PassRefused(f"no value '{lost[0]}' in the graph, which has a calibrated range", model.name)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Lower the model in place; metrics count weights, static and dynamic activations and corrected biases."""
        sites = {site.name: site for site in find_sites(model.ir)}
        values = _values(model.graph)
        unknown = [n for n in (*model.plan.sites, *model.weights) if n not in sites]
        unknown += [name for name in model.bias_shift if name not in sites and name not in values]
        if unknown:
            raise PassRefused(f"no site '{unknown[0]}' in the graph", model.name)
        for name, shift in model.bias_shift.items():
            if name in sites:
                add_to_bias(model.graph, sites[name], shift)
            else:
                add_to_value(model.graph, values[name], shift)
        names = [n for n, p in model.plan.sites.items() if p.weight is not None]
        for name in progress.track(names, "Writing codes"):
            _replace_weight(model, sites[name])
        values = _values(model.graph)
        for name, found in model.ranges.items():
            _quantize_statically(model.graph, values[name], found)
        rows = quantize_rows(model.ir, model.plan, sites)
        model.ir.ir_version = max(model.ir.ir_version or 0, OLDEST_IR)
        model.lowered = True
        metrics = {"weights": len(names), "static": len(model.ranges), "dynamic": rows, "biases": len(model.bias_shift)}
        return PassReport(self.registered_name(), sum(metrics.values()), metrics=metrics)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Inputs and results of the main graph by name."""
    outputs = (value for node in graph for value in node.outputs)
    return {str(value.name): value for value in (*graph.inputs, *outputs) if value.name}


def _replace_weight(model: Model, site: Site) -> None:
    opset = model.graph.opset_imports[""]
    stored = store(site, model.weights[site.name], opset)
    for value in stored.initializers:
        model.graph.register_initializer(value)
    for function in stored.functions:
        functions.add_function(model.ir, function)
    first = next(node for node in model.graph if site.weight in node.inputs)
    model.graph.insert_before(first, stored.nodes)
    site.weight.replace_all_uses_with(stored.value)
    del model.graph.initializers[str(site.weight.name)]
    site.weight.const_value = None
    if stored.needs_int2:
        model.ir.ir_version = max(model.ir.ir_version or 0, INT2_IR)


def _quantize_statically(graph: ir.Graph, value: ir.Value, found: StaticRange) -> None:
    """One QuantizeLinear/DequantizeLinear pair behind `value`, for all its consumers; a graph output stays float."""
    uses = tuple(value.uses())
    scale = _constant(graph, np.float32(found.scale), f"{value.name}_scale")
    zero = _constant(graph, np.uint8(found.zero), f"{value.name}_zero")
    shape = value.shape
    codes = ir.val(f"{value.name}_quantized", dtype=ir.DataType.UINT8, shape=shape)
    output = ir.val(f"{value.name}_dequantized", dtype=ir.DataType.FLOAT, shape=shape)
    pair = [
        ir.node("QuantizeLinear", [value, scale, zero], name=f"{codes.name}_node", outputs=[codes]),
        ir.node("DequantizeLinear", [codes, scale, zero], name=f"{output.name}_node", outputs=[output]),
    ]
    _insert_after(graph, value, pair)
    for node, index in uses:
        node.replace_input_with(index, output)


def quantize_rows(model: ir.Model, plan: Plan, sites: Mapping[str, Site]) -> int:
    """Round the rows that products with dynamic activations read, in place; those that read alike share it.

    Args:
        model: its graph is changed, its weights are not looked at.
        plan: whose entries with dynamic activations are meant.
        sites: of the graph, by name.

    Returns:
        How many values are rounded.
    """
    made: dict[tuple[ir.Value, int, float], ir.Value] = {}
    dynamic = ((sites[name], entry) for name, entry in plan.sites.items() if entry.activation == "dynamic")
    # Several sites may share a user only by sharing its weight, which makes them one site: no node comes twice.
    for site, entry in dynamic:
        bits, clip = entry.activation_bits, entry.activation_clip
        for node in (user for user in site.users if user.op_type in ("MatMul", "Gemm")):
            source = node.inputs[0]
            assert source is not None
            key = (source, bits, clip)
            if key not in made:
                suffix = "" if (bits, clip) == (8, 1) else f"{bits}_{clip:g}"
                quantize = functions.rounded_rows(model, source, bits, clip, f"{source.name}_rows{suffix}")
                _insert_after(model.graph, source, [quantize])
                made[key] = quantize.outputs[0]
            node.replace_input_with(0, made[key])
    return len(made)


def _constant(graph: ir.Graph, number: np.generic, name: str) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.asarray(number), name=name))
    graph.register_initializer(value)
    return value


def _insert_after(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(graph[0], nodes)
