"""The examples run as their pages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_api import write_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "QCOMPILER_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[str, str]:
    model = write_model(tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).normal(size=(64, 32)).astype("f"))
    return str(model), str(tmp_path / "calib.npz")


def test_own_pipeline(tmp_path: Path, arguments: tuple[str, str]) -> None:
    out = run("own_pipeline.py", *arguments, folder=tmp_path)
    assert "bits per weight" in out
    assert (tmp_path / "own.qc" / "model.onnx").exists()
    assert 'name = "gptq"' in (tmp_path / "own.toml").read_text()


def test_own_pass(tmp_path: Path, arguments: tuple[str, str]) -> None:
    plain, protected = run("own_pass.py", *arguments, folder=tmp_path).strip().splitlines()
    bits = [float(line.split(" bits")[0].split()[-1]) for line in (plain, protected)]
    assert bits[1] >= bits[0]


def test_from_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert "bits per weight" in run("from_torch.py", folder=tmp_path)
