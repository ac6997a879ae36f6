"""Budgets and pipelines that cannot be met: refused, before long work where that can be known, with nothing written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler as qc
from qcompiler.cli import run_command
from qcompiler.errors import BadOption, BudgetInfeasible
from qcompiler.formats import parse_spec
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.round.nearest import Nearest
from qcompiler.pipeline import Pass, PassReport
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress, Silent


def write_model(path: Path, nodes: list[onnx.NodeProto], **weights: np.ndarray) -> Path:
    """x [n, 32] -> y [n, 32]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32]) for name in "xy"]
    constants = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def matrix(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(32, 32)).astype("f") / 4


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two products in a row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    nodes = [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    return write_model(tmp_path / "chain.onnx", nodes, v=matrix(0), w=matrix(1))


def batches(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(4, 32)).astype("f")} for _ in range(count)]


@pytest.mark.parametrize("budget", ["8bits", "2kB"])
def test_a_budget_that_fixed_formats_exceed_is_refused_before_any_pass_runs(
    work: Path, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qc.Pipeline, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(BudgetInfeasible, match=r"'uniform' fixes the formats.* most of it in node.*drop --budget"):
        qc.compile(work, "onnx", budget, batches(), "int8")
    assert not Path("chain.qc").exists()


def test_a_budget_that_fixed_formats_meet_is_taken(work: Path) -> None:
    assert (qc.compile(work, "onnx", ("9.1bits", "1MB"), batches(), "int8").bits_per_weight or 99) <= 9.1


def test_fixed_formats_cannot_aim_at_a_latency(work: Path) -> None:
    with pytest.raises(BadOption, match="'uniform' fixes the formats and cannot aim at 8ms"):
        qc.compile(work, "onnx", "8ms", batches(), "int8")


@dataclass(frozen=True)
class Widen(Pass):
    """Give every site 8 bits, whatever the plan said."""

    def run(self, model: Model, progress: Progress) -> PassReport:
        sites = {n: SitePlan(parse_spec("int8-sym-channel-fp32")) for n in model.plan.sites}
        model.plan = model.plan.with_sites(sites)
        return PassReport("widen", len(sites))


def test_a_result_beyond_the_users_budget_is_never_written(work: Path) -> None:
    pipeline = qc.Pipeline([Allocate(budget=("4.6bits",)), Widen(), Nearest(), InsertQDQ()])
    with pytest.raises(BudgetInfeasible, match="--budget: the budget 5bits cannot be met: a pass behind the planner"):
        qc.compile(work, "onnx", "5bits", batches(), pipeline)
    assert not Path("chain.qc").exists()


def test_a_pipelines_own_budget_may_be_left_by_its_own_passes_and_that_is_told(work: Path) -> None:
    pipeline = qc.Pipeline([Allocate(budget=("4.6bits",)), Widen(), Nearest(), InsertQDQ()])
    notes: list[str] = []
    listening = type("Listening", (Silent,), {"note": lambda self, text: notes.append(text)})()
    assert (qc.compile(work, "onnx", None, batches(), pipeline, progress=listening).bits_per_weight or 0) > 8
    assert any("more than 4.6bits: a pass behind the planner made it larger" in note for note in notes)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Allocate(), Nearest()], "--pipeline: the pipeline does not lower the model"),
        ([InsertQDQ(), Allocate()], "--pipeline: the pass 'allocate' comes behind 'insert-qdq'"),
    ],
)
def test_a_pipeline_in_an_impossible_order_is_refused_before_any_pass_runs(
    work: Path, passes: list[Pass], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qc.Pipeline, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(BadOption, match=message):
        qc.compile(work, "onnx", "5bits", batches(), qc.Pipeline(passes))


def test_an_empty_plan_is_explained(work: Path) -> None:
    plain = write_model(work.with_name("plain.onnx"), [helper.make_node("Relu", ["x"], ["y"])])
    result = qc.compile(plain, "onnx", "4bits", explain=True)
    assert result.plan.sites == {}


def test_weights_that_no_plan_can_quantize_are_told_and_make_no_average(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("Einsum", ["x", "w"], ["y"], name="mix", equation="bi,ij->bj")
    write_model(work.with_name("mixed.onnx"), [node], w=matrix(0))
    assert run_command(["mixed.onnx", "--target", "onnx", "--budget", "6bits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bits_per_weight"] is None
    assert run_command(["mixed.onnx", "--target", "onnx", "--budget", "6bits"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "bits per weight none: no weight can be quantized" in out
    assert "not in the average 4.1 kB of float weights: 'w' (it is used by Einsum 'mix')" in out
    assert "4.1 kB of float weights are outside" in Path("mixed.qc", "report.html").read_text()


def test_an_average_of_nothing_but_kept_weights_is_none(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([str(work), "--target", "onnx", "--pipeline", "int8", "--keep", "*", "--explain"]) == 0
    out, err = capsys.readouterr()
    assert "none: all weights are kept" in out
    assert "no weights in the average of bits" in err
