"""What the clock of target cpu runs is what the compiled model runs, with arguments that the kernels take."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm")

from qcompiler.backends.tvm.backend import CpuBackend
from qcompiler.backends.tvm.kernels import KernelSet
from qcompiler.backends.tvm.layout import tiling_for, tiling_of
from qcompiler.backends.tvm.rewrite import Rewrite
from qcompiler.backends.tvm.timing import Convolution, Lookup, Product, Rows
from qcompiler.errors import BackendUnavailable
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.latency import Effort, Times
from qcompiler.measure.shapes import site_shapes
from qcompiler.model import Model
from qcompiler.passes.plan.trial import lowered
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent

QUICK = Effort(windows=1, rounds=3, warm=1)


def nodes_of(nodes: list[Any], weights: dict[str, tuple[int, ...]], inputs: list[Any]) -> Model:
    rng = np.random.default_rng(0)
    made = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], made)
    return Model(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)))


def words() -> tuple[Model, dict[str, Any]]:
    """A table tied with the head, two products of one value."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("MatMul", ["e", "q.weight"], ["q"], name="q"),
        helper.make_node("MatMul", ["e", "k.weight"], ["k"], name="k"),
        helper.make_node("Mul", ["q", "k"], ["h"], name="mul"),
        helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0], name="turn"),
        helper.make_node("MatMul", ["h", "head"], ["y"], name="head"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])
    model = nodes_of(nodes, {"table": (40, 64), "q.weight": (64, 64), "k.weight": (64, 64)}, [ids])
    return model, {"ids": np.zeros((1, 5), np.int64)}


def pictures() -> tuple[Model, dict[str, Any]]:
    """A dense, a depthwise and a one-dimensional convolution."""
    flat = numpy_helper.from_array(np.array([0, 16, 30]), "flat")
    nodes = [
        helper.make_node("Constant", [], ["flat"], value=flat, name="constant"),
        helper.make_node("Conv", ["x", "dense.weight"], ["a"], name="dense", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "depth.weight"], ["b"], name="depth", group=16),
        helper.make_node("Reshape", ["b", "flat"], ["line"], name="flatten"),
        helper.make_node("Conv", ["line", "line.weight"], ["y"], name="line"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 15, 13])
    shapes = {"dense.weight": (16, 3, 3, 3), "depth.weight": (16, 1, 3, 3), "line.weight": (8, 16, 3)}
    return nodes_of(nodes, shapes, [x]), {"x": np.zeros((1, 3, 15, 13), np.float32)}


def plans(model: Model, spec: str, activation: Any) -> dict[str, SitePlan]:
    mode: dict[str, Any] = {s.name: "float" if s.op == "Gather" else activation for s in find_sites(model.ir)}
    return {name: SitePlan(parse_spec(spec), one) for name, one in mode.items()}


CASES = [
    (words, "uint4-asym-g32", "dynamic"),
    (words, "int8-sym-channel-fp32", "float"),
    (pictures, "int8-sym-channel-fp32", "static"),
    (pictures, "uint3-asym-channel", "static"),
    (pictures, "uint2-asym-g9-fp16", "static"),
    (pictures, "int5-sym-channel-bf16", "float"),
]


@pytest.mark.parametrize(("make", "spec", "activation"), CASES)
def test_the_clock_runs_the_kernels_of_the_compiled_model(make: Any, spec: str, activation: str) -> None:
    model, feeds = make()
    chosen = plans(model, spec, activation)
    sites, clock = find_sites(model.ir), CpuBackend().clock()
    shapes = site_shapes(model.ir, sites, feeds)
    parts = [part for site in sites for part in clock.parts(site, chosen[site.name], shapes)]
    alone, whole = KernelSet("portable"), KernelSet("portable")
    for part in parts:
        part.work.kernel(alone)  # type: ignore[attr-defined]
    Rewrite(lowered(model, Plan(chosen)).ir, whole).run()
    assert set(alone._names) == set(whole._names)


def test_every_work_runs_and_takes_time() -> None:
    clock = CpuBackend().clock()
    works: set[Any] = set()
    for make, spec, activation in CASES:
        model, feeds = make()
        sites = find_sites(model.ir)
        shapes = site_shapes(model.ir, sites, feeds)
        works |= {part.work for s in sites for part in clock.parts(s, plans(model, spec, activation)[s.name], shapes)}
    assert {type(work) for work in works} == {Rows, Product, Lookup, Convolution}
    seconds = Times(clock, effort=QUICK).measure(list(works), Silent())
    assert set(seconds) == works
    assert all(0 < value < 1 for value in seconds.values())


def test_more_work_takes_longer() -> None:
    t = tiling_for(parse_spec("uint4-asym-g32"), 512, 512)
    few, many = Product(t, 1, True), Product(t, 64, True)
    seconds = Times(CpuBackend().clock(), effort=Effort()).measure([few, many], Silent())
    assert seconds[many] > 3 * seconds[few]


def test_rows_that_two_products_read_are_shared() -> None:
    model, feeds = words()
    sites = {site.name: site for site in find_sites(model.ir)}
    shapes, clock = site_shapes(model.ir, sites.values(), feeds), CpuBackend().clock()
    q, k, table = (
        clock.parts(sites[n], SitePlan(parse_spec("uint4-asym-g32"), "dynamic"), shapes) for n in ("q", "k", "embed")
    )
    assert [part.share for part in q] == [0.5, 1.0]
    assert q == k
    assert [type(part.work) for part in table] == [Lookup, Rows, Product]
    assert clock.parts(sites["q"], SitePlan(None), shapes) == []


@pytest.mark.parametrize("spec", ["uint4-asym-g32", "int8-sym-channel-fp32", "uint3-asym-tensor-bf16"])
@pytest.mark.parametrize("columns", [30, 100, 20000])
def test_a_format_alone_tells_the_tiling(spec: str, columns: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(3, columns)).astype(np.float32)
    assert tiling_for(parse_spec(spec), 3, columns) == tiling_of(quantize(matrix, parse_spec(spec), "minmax"))


def test_the_machine_is_named_with_kernels_compiler_and_processor() -> None:
    machine = CpuBackend().clock().machine
    assert machine == CpuBackend().clock().machine
    assert "llvm" in machine


def test_no_times_for_another_processor() -> None:
    with pytest.raises(BackendUnavailable, match="no time can be measured for x86-64"):
        CpuBackend(cpu="x86-64").clock()
