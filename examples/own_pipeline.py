"""Compose passes by hand, compile, and look at the plan.

    python examples/own_pipeline.py model.onnx calib.npz

The same list of passes saved as TOML works with `qcompile model.onnx --pipeline mine.toml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import qcompiler as qc
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.pipeline import Pipeline


def main(model: str, calibration: str, output: str = "own.qc") -> None:
    pipeline = Pipeline([Allocate(budget=("5bits",), target="onnx"), GPTQ(), InsertQDQ()])
    Path("own.toml").write_text(pipeline.to_toml())
    result = qc.compile(model, target="onnx", pipeline=pipeline, calibration=calibration, output=output)
    for site, decision in result.plan.sites.items():
        print(f"{site:60s} {decision.weight or 'float'}")
    print(f"{result.bits_per_weight:.3f} bits per weight, {result.fidelity['sqnr_db']:.1f} dB, in {result.artifact}")


if __name__ == "__main__":
    main(*sys.argv[1:])
