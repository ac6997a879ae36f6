"""Recipes with narrow activations run end to end on a small transformer with outliers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qcompiler as qc
from qcompiler.calibration import Calibration
from qcompiler.model import Model
from tests.graph.architectures import feeds_for, inject_outliers, llama


@pytest.fixture
def loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    graph = llama()
    inject_outliers(graph)
    model = Model(graph, "loud")
    model.calibration = Calibration.from_iterable([feeds_for(graph, seed) for seed in range(6)], graph)
    return model


@pytest.mark.parametrize(("recipe", "bits"), [("w4a4", 4), ("w4a8", 8)])
def test_narrow_activations(loud: Model, recipe: str, bits: int) -> None:
    result = qc.compile(loud, "onnx", calibration=loud.calibration, pipeline=recipe)
    assert result.verified
    plans = [plan for plan in result.plan.sites.values() if plan.activation == "dynamic"]
    assert plans
    assert {plan.activation_bits for plan in plans} == {bits}
    plain = next(report for report in result.reports if report.name == "choose-rounding").metrics["trials"]
    assert min(row["loss"] for row in plain) <= plain[0]["loss"]
    assert np.isfinite(result.fidelity["sqnr_db"] or np.nan)


def test_auto_is_the_recipe_that_suits(loud: Model) -> None:
    chosen = [
        qc.compile(loud, "onnx", "6bits", loud.calibration, pipeline=recipe, output=f"{recipe}.qc").reports
        for recipe in ("auto", "decoder")
    ]
    assert [report.name for report in chosen[0]] == [report.name for report in chosen[1]]
    assert "choose-transforms" in [report.name for report in chosen[0]]
