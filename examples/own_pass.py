"""Try a new idea in an afternoon: a pass of your own between the built-in ones.

    python examples/own_pass.py model.onnx calib.npz

A pass is a frozen dataclass whose fields are its options. This one raises the first and the last site of the plan
to 8 bits, the oldest trick of the trade, to see what it buys against the allocator's own choice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import qcompiler as qc
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.round.nearest import Nearest
from qcompiler.pipeline import Pass, PassReport, Pipeline
from qcompiler.progress import Progress


@dataclass(frozen=True)
class ProtectEnds(Pass):
    """Give the first and the last weight of the graph `bits` bits."""

    bits: int = 8

    def run(self, model: Model, progress: Progress) -> PassReport:  # noqa: ARG002 - nothing here takes long
        planned = [s.name for s in find_sites(model.ir) if s.name in model.plan.sites]
        changes = {}
        for name in {planned[0], planned[-1]}:
            site = model.plan.sites[name]
            if site.weight is not None:
                changes[name] = replace(site, weight=site.weight.with_bits(self.bits))
        model.plan = model.plan.with_sites(changes)
        return PassReport("protect-ends", changed=len(changes))


def main(model: str, calibration: str) -> None:
    for name, extra in (("allocator alone", []), ("with protected ends", [ProtectEnds()])):
        pipeline = Pipeline([Allocate(budget=("4bits",), target="onnx"), *extra, Nearest(), InsertQDQ()])
        result = qc.compile(
            model, target="onnx", pipeline=pipeline, calibration=calibration, output=f"{name.split()[0]}.qc"
        )
        print(f"{name:20s} {result.bits_per_weight:.3f} bits, {result.fidelity['sqnr_db']:.2f} dB")


if __name__ == "__main__":
    main(*sys.argv[1:])
