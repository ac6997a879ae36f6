"""Masks of minus infinity: what they make infinite or NaN has no grid, and the rest is quantized as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from onnx import TensorProto, helper

import qcompiler as qc
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.nearest import Nearest
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, planned

LENGTH, WIDTH = 6, 16
PIPELINE = """
[[pass]]
name = "uniform"
activation = "static"
[[pass]]
name = "nearest"
[[pass]]
name = "activation-ranges"
[[pass]]
name = "insert-qdq"
"""


def attention(*, empty: bool, number: int = 3) -> Model:
    """Scores plus (0 or -inf, by an input of tokens that are there); `empty`: sample `number` has none and is NaN."""
    rng = np.random.default_rng(0)
    there = np.ones((24, LENGTH), np.int64)
    for row, count in enumerate(rng.integers(2, LENGTH + 1, 24)):
        there[row, count:] = 0
    there[number] = 0 if empty else there[number]
    weights = {f"{n}.weight": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4 for n in "qkvo"}
    weights |= {"zero": np.array(0, np.float32), "never": np.array(-np.inf, np.float32), "axis": np.array([1])}
    node = helper.make_node
    nodes = [node("MatMul", ["x", f"{n}.weight"], [n], name=n) for n in "qkv"]
    nodes += [
        node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"], name="s"),
        node("Cast", ["m"], ["b"], name="b", to=TensorProto.BOOL),
        node("Where", ["b", "zero", "never"], ["w"], name="w"),
        node("Unsqueeze", ["w", "axis"], ["u"], name="u"),
        node("Add", ["s", "u"], ["masked"], name="masked"),
        node("Softmax", ["masked"], ["p"], name="p", axis=-1),
        node("MatMul", ["p", "v"], ["c"], name="c"),
        node("MatMul", ["c", "o.weight"], ["y"], name="o"),
    ]
    data = {"x": rng.standard_normal((24, LENGTH, WIDTH)).astype(np.float32), "m": there}
    return build(nodes, weights, {"x": ["batch", LENGTH, WIDTH], "m": ["batch", LENGTH]}, ["y"], data)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "search"])
@pytest.mark.parametrize("empty", [False, True])
def test_what_is_not_a_number_stays_float(
    method: Literal["minmax", "percentile", "mse", "search"], empty: bool
) -> None:
    model = planned(attention(empty=empty), "int8-sym-channel-fp32", "static")
    Nearest().run(model, Silent())
    report = ActivationRanges(method).run(model, Silent())
    assert sorted(model.ranges) == (["x"] if empty else ["c", "x"])
    assert [refusal.where for refusal in report.refused] == (["c"] if empty else [])
    assert all("infinite or NaN: it stays float" in refusal.reason for refusal in report.refused)
    assert model.plan.sites["o"].activation == ("float" if empty else "static")
    assert model.plan.sites["q"].activation == "static"
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    assert model.calibration is not None
    (feed,) = model.calibration.batches(24)
    exact, found = (Runner(m.ir)(feed)["y"] for m in (model, lowered))
    known = np.isfinite(exact)
    assert np.isfinite(found[known]).all()
    assert np.square(found - exact)[known].sum() < 0.01 * np.square(exact[known]).sum()


@pytest.mark.parametrize("number", [3, 23])
def test_it_compiles_and_is_verified(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the NaN are among the samples that are held back: then there is no loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "static.toml").write_text(PIPELINE)
    model = attention(empty=True, number=number)
    result = qc.compile(model, "onnx", calibration=model.calibration, pipeline="static.toml")
    assert result.verified
    assert (result.realised_loss is None) == (number == 23)
    assert number == 23 or (result.fidelity["sqnr_db"] or 0) > 20
