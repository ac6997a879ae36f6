"""qcompiler: a compiler whose optimisation is precision.

import qcompiler as qc

model = qc.load("model.onnx")                       # or qc.capture(module, example_inputs)
result = qc.compile(model, target="cpu", budget="3.5bits", calibration="calib.npz")
outputs = qc.load(result.artifact).run(feeds)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.api import CompileResult, capture, compile, load  # noqa: A004
    from qcompiler.artifact import Artifact
    from qcompiler.calibration import Calibration
    from qcompiler.errors import QcompilerError
    from qcompiler.model import Model
    from qcompiler.pipeline import Pipeline
    from qcompiler.plan import Plan, SitePlan
    from qcompiler.progress import Terminal

# ONNX Runtime's wheels report their use to Microsoft over the network unless this is set before the first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Threads of numpy's OpenBLAS spin after each product, by default for 2^28 cycles: beside many small products that
# took a third of the CPU time of rounding, and 10 % of its wall time.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
# Those of torch's OpenMP spin for each other; where other work shares the cores, small networks took 70 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = [
    "Artifact", "Calibration", "CompileResult", "Model", "Pipeline", "Plan", "QcompilerError", "SitePlan", "Terminal",
    "capture", "compile", "load",
]  # fmt: skip

_HOMES = {
    "api": ("CompileResult", "capture", "compile", "load"),
    "artifact": ("Artifact",),
    "calibration": ("Calibration",),
    "errors": ("QcompilerError",),
    "model": ("Model",),
    "pipeline": ("Pipeline",),
    "plan": ("Plan", "SitePlan"),
    "progress": ("Terminal",),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `qcompile --help` does not wait for ONNX Runtime."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"qcompiler.{module}"), name)
    raise AttributeError(f"module 'qcompiler' has no attribute '{name}'")
