"""Multiply-accumulates by hand, and shapes that only a sample decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.formats import parse_spec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.bops import site_bops, site_macs
from qcompiler.measure.shapes import site_shapes
from qcompiler.plan import SitePlan

RNG = np.random.default_rng(0)


def model_of(nodes: list[Any], weights: dict[str, tuple[int, ...]], inputs: list[Any]) -> ir.Model:
    made = [numpy_helper.from_array(RNG.normal(size=s).astype(np.float32), n) for n, s in weights.items()]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", inputs, [out], made)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def floats(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def macs(model: ir.Model, **feeds: np.ndarray) -> list[int]:
    sites = find_sites(model)
    shapes = site_shapes(model, sites, feeds)
    return [site_macs(site, shapes) for site in sites]


def picture(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(("op", "weight", "attributes", "expected"), [
    ("Conv", (6, 4, 3, 3), {}, 6 * 8 * 5 * 4 * 9),
    ("Conv", (6, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}, 6 * 5 * 4 * 4 * 9),
    ("Conv", (6, 2, 3, 3), {"group": 2}, 6 * 8 * 5 * 2 * 9),
    ("Conv", (4, 1, 3, 3), {"group": 4}, 4 * 8 * 5 * 9),
    ("ConvTranspose", (4, 6, 2, 2), {"strides": [2, 2]}, 4 * 10 * 7 * 6 * 4),
    ("ConvTranspose", (4, 3, 2, 2), {"strides": [2, 2], "group": 2}, 4 * 10 * 7 * 3 * 4),
])  # fmt: skip
def test_convolutions_count_what_a_loop_would(
    op: str, weight: tuple[int, ...], attributes: dict[str, Any], expected: int
) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    model = model_of([node], {"w": weight}, [floats("x", "n", 4, "h", "v")])
    assert macs(model, x=picture(1, 4, 10, 7)) == [expected]
    assert macs(model, x=picture(3, 4, 10, 7)) == [3 * expected]


def test_products_follow_the_length_of_the_sample_and_lookups_cost_nothing() -> None:
    """A table tied with the head, a MatMul over three axes and a Gemm."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("MatMul", ["e", "fc"], ["h"]),
        helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "head"], ["logits"]),
        helper.make_node("Flatten", ["logits"], ["m"], axis=2),
        helper.make_node("Gemm", ["m", "last"], ["y"], transB=1),
    ]
    model = model_of(nodes, {"table": (11, 6), "fc": (6, 6), "last": (3, 11)},
                     [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])])  # fmt: skip
    found = dict(zip((s.op for s in find_sites(model)), macs(model, ids=np.zeros((1, 7), np.int64)), strict=True))
    assert found == {"Gather": 7 * 6 * 11, "MatMul": 7 * 6 * 6, "Gemm": 7 * 11 * 3}


def one_site(dtype: type = np.float32) -> Site:
    kind = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    weight = numpy_helper.from_array(RNG.normal(size=(4, 4)).astype(dtype), "w")
    x, y = (helper.make_tensor_value_info(name, kind, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return find_sites(ir.from_proto(model))[0]


@pytest.mark.parametrize(("plan", "factor"), [
    (None, 32 * 32),
    (SitePlan(None), 32 * 32),
    (SitePlan(parse_spec("uint3-asym-g32")), 3 * 32),
    (SitePlan(parse_spec("uint3-asym-g32"), "dynamic"), 3 * 8),
    (SitePlan(parse_spec("int8"), "static"), 8 * 8),
])  # fmt: skip
def test_bits_of_both_factors_count(plan: SitePlan | None, factor: int) -> None:
    assert site_bops(one_site(), plan, 100) == 100 * factor


def test_half_precision_counts_half() -> None:
    assert site_bops(one_site(np.float16), None, 100) == 100 * 16 * 16
    assert site_bops(one_site(np.float16), SitePlan(parse_spec("int4")), 100) == 100 * 4 * 16
