from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.measure.decode import decode_constants
from qcompiler.measure.runner import Runner

TEXT = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
agraph (float[n, 128] x) => (float[n, 32] y)
{
    wide = own.Lift (codes)
    weight = DequantizeLinear <axis = 1> (wide, scale)
    random = RandomNormalLike (noise)
    nothing = Sub (random, random)
    whole = Add (weight, nothing)
    y = MatMul (x, whole)
}
<domain: "own", opset_import: ["" : 21]>
Lift (a) => (b) { c = Constant <value = int8[1] {1}> () b = Add (a, c) }
"""


def model() -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {
        "codes": rng.integers(-100, 100, (128, 32)).astype(np.int8),
        "scale": rng.uniform(0.01, 0.02, 32).astype(np.float32),
        "noise": rng.standard_normal((128, 32)).astype(np.float32),
    }
    return parsed(TEXT, arrays)


def parsed(text: str, arrays: dict[str, np.ndarray]) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return ir.from_proto(proto)


@pytest.mark.parametrize(("dequantize", "gone", "held"), [(False, "Lift", 4096), (True, "DequantizeLinear", 16384)])
def test_a_large_constant_becomes_one_initializer(dequantize: bool, gone: str, held: int) -> None:
    original, decoded = model(), model()
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    decode_constants(decoded, dequantize=dequantize)
    kinds = [node.op_type for node in decoded.graph]
    assert gone not in kinds
    assert ("DequantizeLinear" in kinds) == (not dequantize)
    assert "RandomNormalLike" in kinds
    assert "codes" not in decoded.graph.initializers
    assert not decoded.functions
    sizes = {n: v.const_value.nbytes for n, v in decoded.graph.initializers.items() if v.const_value is not None}
    assert sizes["weight" if dequantize else "wide"] == held
    np.testing.assert_array_equal(Runner(decoded)({"x": x})["y"], Runner(original)({"x": x})["y"])


def test_floats_and_what_is_small_stay() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    agraph (float[n, 64] x) => (float[n, 32] y, int64[2] twice) <int64[2] shape = {-1, 8}>
    {
        turned = Transpose (weight)
        y = MatMul (x, turned)
        twice = Add (shape, shape)
    }"""
    model = parsed(text, {"weight": np.ones((32, 64), np.float32)})
    decode_constants(model, dequantize=True)
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Add"]
