"""Dynamic activations of 3 to 8 bits, from the plan to the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from qcompiler.backends import reference
from qcompiler.backends.onnx.backend import OnnxBackend
from qcompiler.errors import BadOption
from qcompiler.formats import parse_spec
from qcompiler.graph import functions
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.bops import site_bops
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import Rows, menu
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.pipeline import Pipeline
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent

Array = np.ndarray[Any, np.dtype[Any]]
WIDTHS = range(3, 9)
TEXT = """agraph (float[n, 96] x) => (float[n, 24] y, float[n, 16] z) {
    y = MatMul (x, w1)
    z = Gemm <transB = 1> (x, w2, b)
}"""


def model() -> Model:
    """Two products of one value."""
    rng = np.random.default_rng(0)
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{TEXT}')
    shapes = {"w1": (96, 24), "w2": (16, 96), "b": (16,)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    for node in proto.graph.node:
        node.name = node.output[0]
    return Model(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))


def planned(*rows: tuple[int, float], spec: str = "int4-sym-channel-fp32") -> Model:
    """Both sites rounded, each with rows of a width and a clip."""
    found = model()
    plans = {
        site.name: SitePlan(parse_spec(spec), "dynamic", "", bits, clip)
        for site, (bits, clip) in zip(find_sites(found.ir), rows, strict=True)
    }
    found.plan = Plan(plans)
    Nearest().run(found, Silent())
    return found


X = np.random.default_rng(7).standard_normal((5, 96)).astype(np.float32)


@given(bits=st.sampled_from(WIDTHS), clip=st.sampled_from([1.0, 0.9, 0.5]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_codes_stay_in_range_and_are_off_by_half_a_step(bits: int, clip: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((4, 17)) * rng.choice([1e-20, 1.0, 1e20])).astype(np.float32)
    x[0] = 0
    limit = 2 ** (bits - 1) - 1
    codes, scale = reference.quantize_rows(x, limit, clip)
    assert np.abs(codes).max() == limit
    inside = np.abs(x) <= scale * limit
    error = np.abs(codes * scale - x)
    assert (error[inside] <= (scale * np.ones_like(x))[inside] * (0.5 + 1e-4)).all()
    assert (np.abs(codes)[~inside] == limit).all()
    assert inside.all() or clip < 1 or error[~inside].max() <= 1e-6 * np.abs(x).max()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_the_function_is_the_reference_bit_for_bit(bits: int, clip: float) -> None:
    x = X.copy()
    x[1], x[2, :5] = 0, [3.5, -0.5, 0.5, 1.5, 100]
    value = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([5, 96]))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 21}, name="g")
    holder = ir.Model(graph, ir_version=10)
    node = functions.rounded_rows(holder, value, bits, clip, "y")
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    codes, scale = reference.quantize_rows(x, 2 ** (bits - 1) - 1, clip)
    np.testing.assert_array_equal(Runner(holder)({"x": x})["y"], codes * scale)
    found = functions.read_activation(node.outputs[0])
    assert isinstance(found, functions.DynamicActivation)
    assert (found.source, found.limit, found.is_int8) == (value, 2 ** (bits - 1) - 1, (bits, clip) == (8, 1.0))
    assert found.clip == pytest.approx(clip)


def test_eight_bits_are_written_as_they_always_were() -> None:
    found = planned((8, 1.0), (8, 1.0))
    InsertQDQ().run(found, Silent())
    (rows,) = (node for node in found.graph if functions.rounds_rows(node))
    assert (rows.op_type, dict(rows.attributes), rows.outputs[0].name) == ("QuantizeRows", {}, "x_rows")
    assert {key[1] for key in found.ir.functions} == {"QuantizeRows"}


def test_products_of_one_value_may_read_it_at_different_widths(tmp_path: Path) -> None:
    found = planned((4, 0.9), (8, 1.0))
    weights = {n: q.decode() for n, q in found.weights.items()}
    bias = found.graph.initializers["b"].const_value.numpy()  # type: ignore[union-attr]
    assert InsertQDQ().run(found, Silent()).metrics["dynamic"] == 2
    (four, fours), (eight, eights) = reference.quantize_rows(X, 7, 0.9), reference.quantize_rows(X)
    want = {"y": (four * fours) @ weights["y"].T, "z": (eight * eights) @ weights["z"].T + bias}
    got = Runner(found.ir)({"x": X})
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5)
    compiled = OnnxBackend().compile(found, tmp_path, Silent())
    assert set(compiled.facts["forms"].values()) == {"rows"}
    assert (compiled.facts["operations"]["Round"], compiled.facts["operations"]["MatMulInteger"]) == (2, 2)
    fast = OnnxBackend(threads=1).load(tmp_path).run({"x": X})
    for name, array in want.items():
        np.testing.assert_allclose(fast[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["uint4-asym-g32-fp16", "uint2-asym-g32-fp16", "uint8-asym-g32-fp16"])
def test_kernels_that_would_round_to_int8_get_rows_that_are_rounded_before(spec: str, tmp_path: Path) -> None:
    """MatMulNBits with int8 activations would make 8 bits of 4."""
    found = planned((4, 1.0), (4, 1.0), spec=spec)
    InsertQDQ().run(found, Silent())
    want = Runner(found.ir)({"x": X})
    compiled = OnnxBackend().compile(found, tmp_path, Silent())
    assert not any("int8" in form for form in compiled.facts["forms"].values())
    fast = OnnxBackend(threads=1).load(tmp_path).run({"x": X})
    for name, array in want.items():
        np.testing.assert_allclose(fast[name], array, rtol=1e-4, atol=1e-4)


def test_plans_keep_their_width_and_old_ones_are_read() -> None:
    plan = SitePlan(parse_spec("int4"), "dynamic", "", 4, 0.9)
    assert SitePlan.from_json(plan.to_json()) == plan
    old = {"weight": "int4-sym-channel-fp16", "activation": "dynamic"}
    assert SitePlan.from_json(old) == SitePlan(parse_spec("int4"), "dynamic")
    assert SitePlan.from_json(old).to_json() == old
    assert (plan.activation_text, SitePlan.from_json(old).activation_text) == ("dynamic 4-bit", "dynamic")


@pytest.mark.parametrize(
    ("mode", "bits", "clip"),
    [("dynamic", 2, 1.0), ("dynamic", 9, 1.0), ("dynamic", 4, 0.0), ("dynamic", 4, 1.1), ("dynamic", 4, np.nan),
     ("float", 4, 1.0), ("static", 8, 0.9)],
)  # fmt: skip
def test_widths_that_cannot_be_had_are_refused(mode: Any, bits: int, clip: float) -> None:
    for make in (
        lambda: SitePlan(None, mode, "", bits, clip),
        lambda: Uniform(activation=mode, activation_bits=bits, activation_clip=clip),
        lambda: Allocate(activations=mode, activation_bits=bits, activation_clip=clip),
    ):
        with pytest.raises(BadOption):
            make()
    with pytest.raises(BadOption, match="auto activations"):
        Allocate(activation_bits=4)


def test_uniform_and_allocation_ask_for_a_width() -> None:
    found = model()
    Uniform("int4-sym-channel", "dynamic", activation_bits=4, activation_clip=0.9).run(found, Silent())
    assert {(p.activation_bits, p.activation_clip) for p in found.plan.sites.values()} == {(4, 0.9)}
    site = find_sites(found.ir)[0]
    offered = menu(OnnxBackend("dynamic"), site, (4, 8), (), "dynamic", rows=Rows(4, 0.9))
    assert offered.plans
    assert {(p.activation_bits, p.activation_clip) for p in offered.plans} == {(4, 0.9)}
    text = Pipeline([Uniform(activation="dynamic", activation_bits=4)]).to_toml()
    assert Pipeline.from_toml(text).passes == [Uniform(activation="dynamic", activation_bits=4)]


def test_a_target_without_such_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(self: OnnxBackend, site: Site, plan: SitePlan) -> str | None:
        return None if plan.activation_bits == 8 else "rows have 8 bits here"

    monkeypatch.setattr(OnnxBackend, "supports", supports)
    found = model()
    offered = menu(OnnxBackend("dynamic"), find_sites(found.ir)[0], (4, 8), (), "dynamic", rows=Rows(4))
    assert {p.activation_bits for p in offered.plans} == {8}
    assert "8 bits here" in offered.refused[-1].reason
    report = Uniform("int4-sym-channel", "dynamic", activation_bits=4).run(found, Silent())
    assert {p.activation for p in found.plan.sites.values()} == {"float"}
    assert "8 bits here" in report.refused[0].reason


def test_bit_operations_count_the_bits_of_rows() -> None:
    site = find_sites(model().ir)[0]
    assert site_bops(site, SitePlan(parse_spec("int4"), "dynamic", "", 4), 100) == 100 * 4 * 4
