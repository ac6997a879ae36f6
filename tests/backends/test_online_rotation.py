"""Explicit rotations from the pass to the artifact, on every target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.measure.runner import Runner
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import Pipeline
from tests.graph.architectures import ARCHITECTURES, feeds_for


@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_an_artifact_with_explicit_rotations_is_verified_and_runs(target: str, tmp_path: Path) -> None:
    if target == "cpu":
        pytest.importorskip("tvm")
    graph = ARCHITECTURES["opt"]()
    ir.save(graph, tmp_path / "opt.onnx")
    passes = [
        Rotate(heads=True, online=True),
        Uniform("int8-sym-channel-fp32", "dynamic", target=target),
        Nearest(),
        InsertQDQ(),
    ]
    folder, data = tmp_path / "out", feeds_for(graph, batch=8)
    qcompiler.compile(tmp_path / "opt.onnx", target, calibration=data, pipeline=Pipeline(passes), output=folder)
    feeds = feeds_for(graph, 1)
    (wanted,) = Runner(graph)(feeds).values()
    (found,) = qcompiler.load(folder).run(feeds).values()
    assert 0 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.1
