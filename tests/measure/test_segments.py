from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.measure.segments import Segments

RNG = np.random.default_rng(1)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def build(nodes, inputs, outputs, tensors: dict[str, np.ndarray]) -> ir.Model:
    initializers = [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    return ShapeInferencePass()(model).model


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def residual_cnn() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """stem -> relu -> [conv relu conv + skip] x 2 -> pooled -> gemm; convolutions of 3x3."""
    op, tensors = helper.make_node, {"stem": weight(8, 3, 3, 3)}
    nodes = [op("Conv", ["x", "stem"], ["s"], pads=[1] * 4), op("Relu", ["s"], ["h0"])]
    for i in range(2):
        tensors |= {f"a{i}": weight(8, 8, 3, 3), f"b{i}": weight(8, 8, 3, 3)}
        nodes += [
            op("Conv", [f"h{i}", f"a{i}"], [f"ca{i}"], pads=[1] * 4),
            op("Relu", [f"ca{i}"], [f"r{i}"]),
            op("Conv", [f"r{i}", f"b{i}"], [f"cb{i}"], pads=[1] * 4),
            op("Add", [f"h{i}", f"cb{i}"], [f"h{i + 1}"]),
        ]
    tensors |= {"fc": weight(5, 8), "axes": np.array([2, 3])}
    nodes += [
        op("ReduceMean", ["h2", "axes"], ["pool"], keepdims=0),
        op("Gemm", ["pool", "fc"], ["y"], transB=1),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 6, 6])]
    outputs = [
        helper.make_tensor_value_info("y", FLOAT, ["n", 5]),
        helper.make_tensor_value_info("h1", FLOAT, None),
    ]
    return build(nodes, inputs, outputs, tensors), {"x": RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)}


def attention_net(blocks: int = 2, width: int = 16) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Embedding, masked attention and MLP with residuals, head tied to the embedding through Transpose."""
    op = helper.make_node
    tensors = {"table": weight(30, width), "zero": np.zeros(1, np.float32), "low": np.full(1, -1e9, np.float32)}
    tensors |= {"axes": np.array([1])}
    nodes = [
        op("Cast", ["mask"], ["keep"], to=TensorProto.BOOL),
        op("Where", ["keep", "zero", "low"], ["m2"]),
        op("Unsqueeze", ["m2", "axes"], ["bias"]),
        op("Gather", ["table", "ids"], ["h0"]),
    ]
    for i in range(blocks):
        for name in "qkvo":
            tensors[f"{name}{i}"] = weight(width, width)
        tensors |= {f"up{i}": weight(width, 32), f"down{i}": weight(32, width)}
        nodes += [op("MatMul", [f"h{i}", f"{n}{i}"], [f"{n}x{i}"]) for n in "qkv"]
        nodes += [
            op("Transpose", [f"kx{i}"], [f"kt{i}"], perm=[0, 2, 1]),
            op("MatMul", [f"qx{i}", f"kt{i}"], [f"raw{i}"]),
            op("Add", [f"raw{i}", "bias"], [f"s{i}"]),
            op("Softmax", [f"s{i}"], [f"p{i}"], axis=-1),
            op("MatMul", [f"p{i}", f"vx{i}"], [f"c{i}"]),
            op("MatMul", [f"c{i}", f"o{i}"], [f"ox{i}"]),
            op("Add", [f"h{i}", f"ox{i}"], [f"g{i}"]),
            op("MatMul", [f"g{i}", f"up{i}"], [f"u{i}"]),
            op("Relu", [f"u{i}"], [f"ru{i}"]),
            op("MatMul", [f"ru{i}", f"down{i}"], [f"d{i}"]),
            op("Add", [f"g{i}", f"d{i}"], [f"h{i + 1}"]),
        ]
    nodes += [op("Transpose", ["table"], ["tt"], perm=[1, 0]), op("MatMul", [f"h{blocks}", "tt"], ["logits"])]
    inputs = [helper.make_tensor_value_info(n, INT64, ["n", "t"]) for n in ("ids", "mask")]
    outputs = [helper.make_tensor_value_info("logits", FLOAT, ["n", "t", 30])]
    mask = np.ones((2, 5), np.int64)
    mask[1, 3:] = 0
    feeds = {"ids": RNG.integers(0, 30, (2, 5)), "mask": mask}
    return build(nodes, inputs, outputs, tensors), feeds


NETS = {"cnn": residual_cnn, "attention": attention_net}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("max_live", [1, 3])
def test_the_chain_computes_what_the_graph_computes(net: str, max_live: int) -> None:
    model, feeds = NETS[net]()
    expected = Runner(model)(feeds)
    segments = Segments(model, max_live=max_live)
    assert len(segments) > 2
    assert [s.name for part in segments for s in part.sites] == [s.name for s in find_sites(model)]
    boundary = segments.start(feeds)
    for segment in segments:
        suffix = segments.run(boundary, start=segment.index)
        boundary = segment.run(boundary)
        for name, array in expected.items():
            np.testing.assert_allclose(suffix[name], array, rtol=1e-5, atol=1e-6)
    for name, array in segments.run(boundary, start=len(segments)).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_a_replaced_weight_counts_from_its_segment_on(net: str) -> None:
    """Also for the tied table, which the first and the last segment use."""
    model, feeds = NETS[net]()
    segments = Segments(model)
    for segment, boundary in segments.boundaries(feeds):
        for site in segment.sites:
            assert site.weight.const_value is not None
            assert site.weight.name is not None
            old = site.weight.const_value.numpy()
            new = (old + RNG.standard_normal(old.shape).astype(np.float32) * 0.1).astype(np.float32)
            replace = {site.weight.name: new}
            expected = Runner(model, replaceable=list(replace))({**feeds, **replace})
            at_once = segments.run(boundary, segment.index, replace)
            after = segment.run(boundary, replace)
            stepped = segments.run(after, segment.index + 1, replace)
            for name, array in expected.items():
                np.testing.assert_allclose(at_once[name], array, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(stepped[name], array, rtol=1e-4, atol=1e-5)
    unchanged = segments.run(segments.start(feeds))
    for name, array in Runner(model)(feeds).items():
        np.testing.assert_allclose(unchanged[name], array, rtol=1e-5, atol=1e-6)


def test_cuts_lie_where_one_value_is_alive() -> None:
    model, feeds = attention_net()
    segments = Segments(model)
    assert [[s.weight.name for s in part.sites] for part in segments] == [
        ["table"], ["q0", "k0", "v0", "o0"], ["up0", "down0"], ["q1", "k1", "v1", "o1"], ["up1", "down1"], [],
    ]  # fmt: skip
    boundaries = [sorted(boundary) for _, boundary in segments.boundaries(feeds)]
    assert boundaries[0] == ["bias", "ids"]
    assert boundaries[1:] == [["bias", "h0"], ["bias", "g0"], ["bias", "h1"], ["g1"], ["h2"]]


def test_a_large_segment_is_cut_where_more_values_cross() -> None:
    model, _ = attention_net()
    sizes = [len(part.sites) for part in Segments(model, most_sites=3)]
    assert max(sizes) <= 3
    assert sum(sizes) == 13


def test_activations_can_be_read_with_and_without_changes() -> None:
    model, feeds = residual_cnn()
    segments = Segments(model)
    for segment, boundary in segments.boundaries(feeds):
        if any(site.weight.name == "a0" for site in segment.sites):
            zero = {"a0": np.zeros((8, 8, 3, 3), np.float32)}
            plain = segment.read(boundary, ["r0", "h0"])
            changed = segment.run(boundary, zero, extra_outputs=["r0"])
            expected = Runner(model, outputs=["r0", "h0"])(feeds)
            np.testing.assert_allclose(plain["r0"], expected["r0"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(plain["h0"], expected["h0"], rtol=1e-5, atol=1e-6)
            assert not changed["r0"].any()
            break
    else:
        pytest.fail("no segment holds a0")
    segments.drop()
    np.testing.assert_allclose(
        segments.run(segments.start(feeds))["y"], Runner(model)(feeds)["y"], rtol=1e-5, atol=1e-6
    )


def test_a_graph_without_sites_is_all_preamble() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    info = [helper.make_tensor_value_info(n, FLOAT, ["n"]) for n in "xy"]
    model = build([node], info[:1], info[1:], {})
    segments = Segments(model)
    assert len(segments) == 0
    found = segments.run(segments.start({"x": np.array([-1, 2], np.float32)}))
    np.testing.assert_array_equal(found["y"], [0, 2])
