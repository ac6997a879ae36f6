"""ONNX Runtime sessions: options, the loaded artifact, and what the optimiser made of a graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.graph.storage import map_once
from qcompiler.measure.decode import decode_constants
from qcompiler.measure.in_place import open_in_place
from qcompiler.target import Feeds, Outputs


def session_options(threads: int = 0) -> Any:
    """`ort.SessionOptions` for our fast form: all optimisations, none that changes the meaning of weights.

    ONNX Runtime would quantize activations to int8 wherever it fuses DequantizeLinear with MatMul itself
    (accuracy level 4 is its default); level 0 forbids that.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


def reference_options(threads: int = 0) -> Any:
    """`ort.SessionOptions` under which ONNX Runtime computes what the QDQ graph says: nothing is fused to int8."""
    options = session_options(threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


@dataclass(frozen=True, eq=False)
class OrtRunnable:
    """A loaded model file, and the arrays that its session reads."""

    session: ort.InferenceSession
    arrays: list[npt.NDArray[Any]]

    @staticmethod
    def open(path: Path, options: Any) -> OrtRunnable:
        """Load a file on the CPU.

        Weights are unpacked here one by one: ONNX Runtime can do it too, but takes ten times the memory.
        """
        model = map_once(ir.load(path))
        decode_constants(model, dequantize=False)
        return OrtRunnable(*open_in_place(model, options))

    def run(self, feeds: Feeds) -> Outputs:
        """All outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        return {n: np.asarray(v) for n, v in zip(names, self.session.run(names, dict(feeds)), strict=True)}


def optimized_operations(path: Path) -> Counter[str]:
    """Types of the operations that ONNX Runtime runs for a model file, after all fusions, domains left out.

    The domain of a fused operation depends on the layout that ONNX Runtime chose for this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options = session_options()
        options.optimized_model_filepath = str(target)
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, "optimized.data")
        options.add_session_config_entry("session.disable_prepacking", "1")  # nothing is run: no second copy of weights
        OrtRunnable.open(path, options)
        graph = ir.load(target).graph
        return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(graph))


def unfused(counts: Counter[str], expected: Mapping[str, int]) -> dict[str, Any]:
    """Expected operation types ("A", or "A|B" for either) that are missing -> {"expected": n, "found": m}."""
    found = {name: sum(counts[kind] for kind in name.split("|")) for name in expected}
    return {name: {"expected": n, "found": found[name]} for name, n in expected.items() if found[name] < n}
