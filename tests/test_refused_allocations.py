"""`qcompile` with budgets that no allocation meets, and without what solves it: one line, exit code 2, nothing left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pulp
import pytest
from onnx import helper

from qcompiler.cli import run_command
from tests.test_refused_budgets import matrix, write_model


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of two products and data for it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    nodes = [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    write_model(tmp_path / "chain.onnx", nodes, v=matrix(0), w=matrix(1))
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).normal(size=(24, 32)).astype("f"))
    return tmp_path


def refused(work: Path, capsys: pytest.CaptureFixture[str], *options: str, target: str = "onnx") -> str:
    """The line that says why."""
    assert run_command(["chain.onnx", "--target", target, "--calib", "data.npz", *options]) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("qcompile: ")]
    assert len(lines) == 1
    assert shown.err.splitlines()[-1] == lines[0]
    assert "bug" not in lines[0]
    assert shown.out == ""
    assert {path.name for path in work.iterdir()} <= {"chain.onnx", "data.npz", "cache"}
    return lines[0]


def budgets(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--budget", text)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["1bits"], "the budget 1bits cannot be met; the smallest feasible budget is 2."),
        (["100B"], "the budget 100B cannot be met; the smallest feasible budget is "),
        (["1kbops"], "the budget 1kbops cannot be met; the smallest feasible budget is "),
        (["8bits", "1kbops"], "the budget 1kbops cannot be met; the smallest feasible budgets are 2."),
        (["1bits", "100B"], "the budgets 1bits and 100B cannot be met; the smallest feasible budgets are 2."),
        (["4bits", "1ms"], "target onnx cannot measure times, which the budget 1ms needs"),
        (["0bits"], "is not a positive amount"),
        (["-1e3MB"], "is not a positive amount"),
        (["nanbits"], "is not a positive amount"),
        (["1e9999bits"], "is not"),
        (["4b"], "has no known unit"),
        (["four bits"], "is not an amount"),
        ([""], "is not an amount"),
        (["4bits@2"], ""),
        (["4bits", "junk"], "is not an amount"),
    ],
)
def test_budgets(work: Path, capsys: pytest.CaptureFixture[str], asked: list[str], message: str) -> None:
    assert message in refused(work, capsys, *budgets(*asked))


def test_a_latency_that_is_too_short(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(work, capsys, *budgets("4bits", "0.00001ms"), target="cpu")
    assert "the budget 0.00001ms cannot be met; the smallest feasible budgets are 2." in line
    assert "ms, each alone" in line


@pytest.mark.parametrize("extra", [[], ["--explain"], ["--pareto"]])
def test_without_an_integer_solver(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda _: False)
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "available", lambda _: False)
    line = refused(work, capsys, *budgets("4bits"), *extra)
    assert line == "qcompile: allocate: no integer solver is usable (HiGHS, CBC); pip install highspy"
    assert not (work / "cache").exists()


def test_cbc_solves_where_highs_is_not_usable(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda _: False)
    assert run_command(["chain.onnx", "--target", "onnx", "--calib", "data.npz", *budgets("4.6bits"), "--explain"]) == 0
    assert "gap to the bound      0.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('method = "guess"', "unknown name 'guess'; choose one of ilp, lagrangian"),
        ('loss = "guess"', "loss cannot be 'guess'"),
        ("bits = [1]", "give widths from 2 to 8"),
        ("bits = [9]", "give widths from 2 to 8"),
        ("pareto = 1", "give 2 to 1000 points"),
        ("rerank = 0", "rerank must be 1 or more"),
        ("samples = -3", "samples and seconds must be 0 or more"),
        ("seconds = -1.0", "samples and seconds must be 0 or more"),
        ("seconds = nan", "samples and seconds must be 0 or more"),
    ],
)
def test_options_of_the_pass(
    work: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, options: str, message: str
) -> None:
    file = tmp_path_factory.mktemp("recipe") / "own.toml"
    file.write_text(
        f'[[pass]]\nname = "allocate"\n{options}\n[[pass]]\nname = "nearest"\n[[pass]]\nname = "insert-qdq"\n'
    )
    assert message in refused(work, capsys, *budgets("4bits"), "--pipeline", str(file))
