"""A compact builder of graphs, with the parts that exporters write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

WIDTH, HEADS, VOCABULARY, LAYERS = 16, 4, 40, 2
HEAD = WIDTH // HEADS


class Net:
    """Builds a graph operation by operation; values are `ir.Value`."""

    def __init__(self, seed: int = 0, opset: int = 21) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        self.inputs.append(ir.val(name, dtype=dtype, shape=ir.Shape(shape)))
        return self.inputs[-1]

    def const(self, array: Any, name: str = "") -> ir.Value:
        array = np.asarray(array)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = name or f"c{len(self.constants)}"
        self.constants[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.constants[name]

    def random(self, *shape: int, name: str = "") -> ir.Value:
        return self.const(self.rng.normal(size=shape) / np.sqrt(shape[0]), name)

    def gain(self, width: int, name: str = "") -> ir.Value:
        return self.const(self.rng.uniform(0.5, 2.0, width), name)

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        node = ir.node(
            kind, inputs, attributes=attributes, num_outputs=outputs, domain=domain, name=f"n{len(self.nodes)}"
        )
        for k, value in enumerate(node.outputs):
            value.name = f"{kind.lower()}_{len(self.nodes)}_{k}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def ints(self, *numbers: int) -> ir.Value:
        return self.const(np.array(numbers, np.int64))

    def linear(self, x: ir.Value, k: int, n: int, bias: bool = True, name: str = "") -> ir.Value:
        y = self.op("MatMul", x, self.random(k, n, name=f"{name}.weight" if name else ""))
        return self.op("Add", y, self.random(n)) if bias else y

    def conv(self, x: ir.Value, i: int, o: int, k: int = 3, groups: int = 1, **attributes: Any) -> ir.Value:
        w = self.const(self.rng.normal(size=(o, i // groups, k, k)) / np.sqrt(i // groups * k * k))
        return self.op("Conv", x, w, self.random(o), group=groups, pads=[k // 2] * 4, **attributes)

    def layer_norm(self, x: ir.Value, width: int = WIDTH) -> ir.Value:
        return self.op("LayerNormalization", x, self.gain(width), self.random(width), axis=-1, epsilon=1e-5)

    def rms_norm(self, x: ir.Value, width: int = WIDTH, plus_one: bool = False) -> ir.Value:
        """As torch.onnx writes it before opset 23; Gemma multiplies by 1 + gamma."""
        mean = self.op("ReduceMean", self.op("Pow", x, self.const(np.float32(2))), self.ints(-1))
        root = self.op("Sqrt", self.op("Add", mean, self.const(np.float32(1e-6))))
        gain = self.gain(width)
        if plus_one:
            gain = self.op("Add", gain, self.const(np.float32(1)))
        return self.op("Mul", gain, self.op("Mul", x, self.op("Reciprocal", root)))

    def heads(self, x: ir.Value, count: int) -> ir.Value:
        """[batch, seq, count * d] -> [batch, count, seq, d]."""
        return self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, count, -1)), perm=[0, 2, 1, 3])

    def repeat(self, x: ir.Value, kv: int, times: int) -> ir.Value:
        """[batch, kv, seq, d] -> [batch, kv * times, seq, d], as exporters write repeat_kv."""
        wide = self.op("Expand", self.op("Unsqueeze", x, self.ints(2)), self.ints(1, 1, times, 1, 1))
        return self.op("Reshape", wide, self.ints(0, kv * times, -1, HEAD))

    def rotate(self, x: ir.Value, seq: int, interleaved: bool = False) -> ir.Value:
        """Rotary embedding in elementary operations."""
        angle = np.outer(np.arange(seq), 1.0 / 10 ** np.arange(HEAD // 2))
        angle = np.repeat(angle, 2, axis=1) if interleaved else np.concatenate([angle, angle], 1)
        cos, sin = self.const(np.cos(angle)), self.const(np.sin(angle))
        if interleaved:
            pairs = self.op("Reshape", x, self.ints(0, 0, 0, HEAD // 2, 2))
            even = self.op("Gather", pairs, self.const(np.array(0)), axis=-1)
            odd = self.op("Gather", pairs, self.const(np.array(1)), axis=-1)
            parts = [self.op("Unsqueeze", v, self.ints(-1)) for v in (self.op("Neg", odd), even)]
            turned = self.op("Reshape", self.op("Concat", *parts, axis=-1), self.ints(0, 0, 0, HEAD))
        else:
            low = self.op("Slice", x, self.ints(0), self.ints(HEAD // 2), self.ints(3))
            high = self.op("Slice", x, self.ints(HEAD // 2), self.ints(2**62), self.ints(3))
            turned = self.op("Concat", self.op("Neg", high), low, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """[batch, heads, seq, d] each -> [batch, seq, heads * d]."""
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Mul", scores, self.const(np.float32(HEAD**-0.5)))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        return self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.ints(0, 0, WIDTH))

    def gelu(self, x: ir.Value) -> ir.Value:
        half = self.op("Erf", self.op("Mul", x, self.const(np.float32(0.5**0.5))))
        return self.op(
            "Mul", self.op("Mul", x, self.const(np.float32(0.5))), self.op("Add", half, self.const(np.float32(1)))
        )

    def silu(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=list(self.constants.values()),
            opset_imports={"": self.opset, "com.microsoft": 1}, name="net",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10)
        onnx_ir.passes.common.ShapeInferencePass()(model)
        return model
