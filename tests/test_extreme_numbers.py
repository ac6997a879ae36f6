"""Weights and data of any finite size: compiled as well as those of usual size, or refused in one line."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.artifact.verify import compare
from qcompiler.cli import run_command
from qcompiler.errors import PassRefused
from qcompiler.evaluate.fidelity import fidelity
from qcompiler.measure.loss import Reference, output_loss

TVM = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="needs tvm")
TARGETS = ["onnx", pytest.param("cpu", marks=TVM)]
X = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)


def write(
    folder: Path, first: float = 1, second: float = 1, one: float | None = None, data: np.ndarray = X
) -> list[str]:
    """x [n, 16] -> 64, Relu -> y [n, 8]; factors of the weights, one weight; the arguments of the command line."""
    rng = np.random.default_rng(0)
    weights = {
        "first": (rng.standard_normal((16, 64)) / 4 * first).astype(np.float32),
        "second": (rng.standard_normal((64, 8)) / 8 * second).astype(np.float32),
    }
    if one is not None:
        weights["first"][0, 5] = one
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"], name="layer1"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["y"], name="layer2"),
    ]
    graph = helper.make_graph(
        nodes, "two", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(proto, folder / "two.onnx")
    np.savez(folder / "data.npz", x=data)
    return [str(folder / "two.onnx"), "--calib", str(folder / "data.npz"), "--output", str(folder / "out")]


def compiled(
    folder: Path, *, target: str = "onnx", pipeline: str | None = None, effort: str = "default", **numbers: Any
) -> Any:
    folder.mkdir(exist_ok=True)
    write(folder, **numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return qcompiler.compile(
            folder / "two.onnx", target, None if pipeline == "int8" else "12bits", folder / "data.npz",
            pipeline=pipeline, output=folder / "out", resume=False, effort=effort,
        )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_factors_of_the_weights_do_not_matter(tmp_path: Path, target: str) -> None:
    # With trials, noise decides between settings that are nearly as good.
    plain = compiled(tmp_path / "plain", target=target, effort="low")
    for number, (first, second) in enumerate([(1e-12, 1e12), (1e12, 1e-12), (1e-30, 1.0)]):
        other = compiled(tmp_path / str(number), target=target, effort="low", first=first, second=second)
        assert other.verified
        assert other.fidelity["sqnr_db"] == pytest.approx(plain.fidelity["sqnr_db"], abs=1)
        assert other.predicted_loss == pytest.approx(plain.predicted_loss, rel=0.3)
        assert other.plan.sites["layer1"].weight.scale_dtype == "float32"
        assert other.bits_per_weight > plain.bits_per_weight  # float32 scales are counted


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20])
def test_static_ranges_follow_activations_of_any_size(tmp_path: Path, factor: float) -> None:
    plain = compiled(tmp_path / "plain", pipeline="int8")
    other = compiled(tmp_path / "other", pipeline="int8", data=X * np.float32(factor))
    assert other.fidelity["sqnr_db"] == pytest.approx(plain.fidelity["sqnr_db"], abs=1)


@pytest.mark.parametrize("pipeline", ["int8", "quick", "encoder"])
@pytest.mark.parametrize("numbers", [{"one": 1e30}, {"data": X * np.float32(1e30)}], ids=["weight", "data"])
def test_huge_numbers_are_compiled_without_warnings(tmp_path: Path, pipeline: str, numbers: dict[str, Any]) -> None:
    result = compiled(tmp_path, pipeline=pipeline, **numbers)
    assert result.fidelity["sqnr_db"] > 30


def test_overflow_of_a_layer_is_refused_in_its_name(tmp_path: Path) -> None:
    with pytest.raises(PassRefused, match=r"layer1: the output is infinite"):
        compiled(tmp_path, one=2e38, data=X * 100)


@pytest.mark.parametrize("extra", [["--pipeline", "int8"], ["--budget", "12bits", "--effort", "low"]])
def test_data_of_very_different_sizes_is_refused_by_the_layer(
    tmp_path: Path, extra: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = X.copy()
    data[40:] *= np.float32(1e30)
    assert run_command([*write(tmp_path, data=data), "--target", "onnx", *extra]) == 2
    errors = capfd.readouterr().err
    assert errors.strip().splitlines()[-1].startswith("qcompile: layer1: its weights, or its inputs on this data, are")
    assert "Warning" not in errors


def test_trials_go_on_without_a_step_that_refuses_the_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = X.copy()
    data[40:] *= np.float32(1e30)
    assert run_command([*write(tmp_path, data=data), "--target", "onnx", "--budget", "12bits"]) == 0
    errors = capfd.readouterr().err
    assert "choose-rounding: no gptq: layer1: its weights, or its inputs on this data, are" in " ".join(errors.split())
    assert "Warning" not in errors


def test_infinite_data_is_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = X.copy()
    data[7, 3] = np.inf
    assert run_command([*write(tmp_path, data=data), "--target", "onnx", "--budget", "12bits"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "data.npz" in last
    assert "'x' holds infinity, first in sample 7" in last


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20])
def test_losses_are_relative_to_outputs_of_any_size(size: float) -> None:
    y = (np.random.default_rng(3).standard_normal((40, 6)) * size).astype(np.float32)
    other = (y * np.float32(1.01)).astype(np.float32)
    assert output_loss({"y": y}, {"y": other}) == pytest.approx(1e-4, rel=1e-3)
    losses, sketch = Reference({"y": y}).measure({"y": other})
    assert float(np.square(sketch).sum()) / 2 == pytest.approx(float(losses.mean()), rel=1e-3)
    assert fidelity({"y": y}, {"y": other})["sqnr_db"] == pytest.approx(40, abs=0.1)
    assert compare({"y": other}, {"y": y}).relative == pytest.approx(0.01, rel=1e-3)


def test_outputs_of_zeros_have_finite_losses_and_no_tolerance() -> None:
    zeros, ones = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)
    assert output_loss({"y": zeros}, {"y": zeros}) == 0
    assert output_loss({"y": zeros}, {"y": ones}) == 12
    assert compare({"y": zeros}, {"y": zeros}).relative == 0
    assert compare({"y": ones}, {"y": zeros}).relative == np.inf
