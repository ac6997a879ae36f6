"""A small gated MLP behind a norm, with channels that stand out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import helper

import qcompiler as qc
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from tests.passes.round.small_models import build

WIDTH = 64


def gated(outliers: float = 1.0, *, samples: int = 24, seed: int = 0, share: float = 1.0) -> Model:
    """x [batch, 8, 64] -> LayerNormalization -> Relu(gate) * (up + bias) -> down; Gaussian weights.

    Args:
        outliers: by which three channels behind the norm are larger.
        samples: of calibration data, white.
        seed: of everything.
        share: size of all weights relative to the usual.
    """
    rng = np.random.default_rng(seed)
    gain = np.ones(WIDTH, np.float32)
    gain[rng.choice(WIDTH, 3, replace=False)] = outliers

    def weight(columns: int, rows: int) -> np.ndarray:
        return (share * rng.standard_normal((columns, rows)) / np.sqrt(columns)).astype(np.float32)

    weights = {
        "gain": gain,
        "shift": np.zeros(WIDTH, np.float32),
        "gate.weight": weight(WIDTH, 96),
        "up.weight": weight(WIDTH, 96),
        "up.bias": rng.standard_normal(96).astype(np.float32),
        "down.weight": weight(96, WIDTH),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "gate.weight"], ["g"], name="gate"),
        helper.make_node("Relu", ["g"], ["r"], name="relu"),
        helper.make_node("MatMul", ["n", "up.weight"], ["u0"], name="up"),
        helper.make_node("Add", ["u0", "up.bias"], ["u"], name="up_bias"),
        helper.make_node("Mul", ["r", "u"], ["h"], name="product"),
        helper.make_node("MatMul", ["h", "down.weight"], ["y"], name="down"),
    ]
    x = rng.standard_normal((samples, 8, WIDTH)).astype(np.float32)
    return build(nodes, weights, {"x": ["batch", 8, WIDTH]}, ["y"], {"x": x})


def artifact_error(model: Model, pipeline: str, target: str, folder: Path) -> float:
    """Squared error of a model's artifact on the first samples, relative to the power of its output.

    Args:
        model: with calibration data, which it is compiled with; compiling verifies the artifact.
        pipeline: TOML.
        target: name of a backend.
        folder: to write to.
    """
    (folder / "pipeline.toml").write_text(pipeline)
    ir.save(model.ir, folder / "small.onnx")
    assert model.calibration is not None
    data = list(model.calibration.batches(2))
    qc.compile(folder / "small.onnx", target, None, data, folder / "pipeline.toml", output=folder / "small.qc")
    exact = Runner(model.ir)(data[0])["y"]
    found = qc.load(folder / "small.qc").run(data[0])["y"]
    return float(np.square(found - exact).sum() / np.square(exact).sum())
