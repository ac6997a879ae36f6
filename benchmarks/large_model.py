"""Does a model of two billion weights go through scale folding, rotation and GPTQ in bounded memory?

    python benchmarks/large_model.py --folder DIR [--width 2560] [--inner 6912] [--layers 20] [--vocabulary 100000]
        [--seconds N]

Writes a decoder with random weights (in Llama's form, float32, external data, outlier channels in its gains) to DIR,
if it is not there yet, compiles it to 4 bits in groups of 32 in a process of its own, and prints how many weights, the
peak of the resident memory of that process and its children, seconds, and what the command line tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import psutil

_HEAD = 64
_LENGTH = 128
_PART = 1 << 24  # numbers drawn at a time
_PIPELINE = """
[[pass]]
name = "scale-fold"

[[pass]]
name = "rotate"

[[pass]]
name = "uniform"
spec = "int4-sym-g32-fp16"

[[pass]]
name = "gptq"
samples = 8
tokens = 1024
sweeps = 0

[[pass]]
name = "insert-qdq"
"""


class Decoder:
    """Writes weights to a file while it builds the graph that reads them."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.with_suffix(".data").open("wb")
        self.rng = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def small(self, array: Any) -> ir.Value:
        name = f"c{len(self.constants)}"
        self.constants.append(ir.val(name, const_value=ir.tensor(np.asarray(array), name=name)))
        return self.constants[-1]

    def weight(self, *shape: int) -> ir.Value:
        name, start, count = f"w{len(self.constants)}", self.file.tell(), int(np.prod(shape))
        for first in range(0, count, _PART):
            part = self.rng.standard_normal(min(_PART, count - first), np.float32) / np.float32(shape[0] ** 0.5)
            self.file.write(part.tobytes())
        where = self.path.with_suffix(".data").name
        tensor = ir.ExternalTensor(
            where, start, 4 * count, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )
        self.constants.append(ir.val(name, const_value=tensor))
        return self.constants[-1]

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def norm(self, x: ir.Value, width: int) -> ir.Value:
        """RMS norm as torch.onnx writes it, with a few gains that make outlier channels."""
        gain = self.rng.uniform(0.5, 1.5, width).astype(np.float32)
        gain[self.rng.integers(0, width, 4)] = 20
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.small(np.array([-1])))
        root = self.op("Sqrt", self.op("Add", mean, self.small(np.float32(1e-5))))
        return self.op("Mul", self.op("Div", x, root), self.small(gain))

    def block(self, x: ir.Value, width: int, inner: int) -> ir.Value:
        """Attention and a gated product, each behind a norm and beside the stream."""
        h = self.norm(x, width)
        split = self.small(np.array([0, 0, width // _HEAD, _HEAD]))
        q, k, v = (self.op("Reshape", self.op("MatMul", h, self.weight(width, width)), split) for _ in range(3))
        q, v = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = self.op("Softmax", self.op("Mul", scores, self.small(np.float32(_HEAD**-0.5))), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        mixed = self.op("Reshape", mixed, self.small(np.array([0, 0, width])))
        x = self.op("Add", x, self.op("MatMul", mixed, self.weight(width, width)))
        h = self.norm(x, width)
        gate, up = (self.op("MatMul", h, self.weight(width, inner)) for _ in range(2))
        gated = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.op("Add", x, self.op("MatMul", gated, self.weight(inner, width)))


def write(path: Path, width: int, inner: int, layers: int, vocabulary: int) -> None:
    """The model and its weights."""
    net = Decoder(path)
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=ir.Shape(["batch", _LENGTH]))
    x = net.op("Gather", net.weight(vocabulary, width), ids)
    for layer in range(layers):
        x = net.block(x, width, inner)
        print(f"layer {layer + 1} of {layers}", file=sys.stderr, flush=True)
    out = net.op("MatMul", net.norm(x, width), net.weight(width, vocabulary))
    net.file.close()
    graph = ir.Graph([ids], [out], nodes=net.nodes, initializers=net.constants, opset_imports={"": 21}, name="decoder")
    model = ir.Model(graph, ir_version=10)
    onnx_ir.passes.common.ShapeInferencePass()(model)
    ir.save(model, path)
    np.savez(path.with_suffix(".npz"), ids=net.rng.integers(0, vocabulary, (12, _LENGTH)))


def watched(command: Sequence[str], seconds: float) -> tuple[int, int, float, str]:
    """Run a command: its exit status, peak resident bytes of it and its children together, seconds, standard output."""
    start, peak = time.monotonic(), 0
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and time.monotonic() - start < seconds:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    if process.poll() is None:
        process.terminate()
    return process.wait(), peak, time.monotonic() - start, process.stdout.read() if process.stdout else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of compiling a large model")
    parser.add_argument("--folder", type=Path, required=True)
    for name, value in (("width", 2560), ("inner", 6912), ("layers", 20), ("vocabulary", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"decoder_{args.width}_{args.inner}_{args.layers}_{args.vocabulary}.onnx"
    if not path.exists():
        write(path, args.width, args.inner, args.layers, args.vocabulary)
    pipeline = args.folder / "pipeline.toml"
    pipeline.write_text(_PIPELINE)
    command = [sys.executable, "-m", "qcompiler.cli", str(path), "--target", "onnx", "--pipeline", str(pipeline)]
    command += ["--calib", str(path.with_suffix(".npz")), "-o", str(args.folder / "large.qc"), "--json"]
    status, peak, seconds, out = watched(command, args.seconds)
    facts: dict[str, Any] = json.loads(out.strip().splitlines()[-1]) if status == 0 else {}
    size = path.with_suffix(".data").stat().st_size
    print(json.dumps({"weights": size // 4, "exit": status, "peak_rss_gb": peak / 1e9, "seconds": seconds} | facts))


if __name__ == "__main__":
    main()
