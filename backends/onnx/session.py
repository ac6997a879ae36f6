"""ONNX Runtime sessions: options, the loaded artifact, and what the optimiser made of a graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.target import Feeds, Outputs


def session_options(threads: int = 0) -> ort.SessionOptions:
    """Options for our fast form: all optimisations, none that changes the meaning of weights.

    ONNX Runtime would quantize activations to int8 wherever it fuses DequantizeLinear with MatMul itself
    (accuracy level 4 is its default); level 0 forbids that.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


def reference_options(threads: int = 0) -> ort.SessionOptions:
    """Options under which ONNX Runtime computes what the QDQ graph says: constants folded, nothing fused to int8."""
    options = session_options(threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


@dataclass(frozen=True, eq=False)
class OrtRunnable:
    """A loaded model file."""

    session: ort.InferenceSession

    @staticmethod
    def open(path: Path, options: ort.SessionOptions) -> OrtRunnable:
        """Load a file on the CPU."""
        return OrtRunnable(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))

    def run(self, feeds: Feeds) -> Outputs:
        """All outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        return {n: np.asarray(v) for n, v in zip(names, self.session.run(names, dict(feeds)), strict=True)}


def optimized_operations(path: Path) -> Counter[str]:
    """Operation types that ONNX Runtime runs for a model file, after all fusions, "domain:type" where not ONNX's own."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options = session_options()
        options.optimized_model_filepath = str(target)
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, "optimized.data")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = ir.load(target).graph
        return Counter(_label(node) for node in ir.traversal.RecursiveGraphIterator(graph))


def _label(node: ir.Node) -> str:
    return f"{node.domain}:{node.op_type}" if node.domain not in ("", "com.ms.internal.nhwc") else node.op_type


def unfused(counts: Counter[str], expected: dict[str, int]) -> dict[str, Any]:
    """Expected operation types that are missing: type -> {"expected": n, "found": m}."""
    short = {name: n for name, n in expected.items() if counts[name] < n}
    return {name: {"expected": n, "found": counts[name]} for name, n in short.items()}
