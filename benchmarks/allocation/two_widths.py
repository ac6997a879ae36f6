"""Do groups of two widths pay? True losses on the public split at the bits that are stored.

    python benchmarks/allocation/two_widths.py --assets DIR --model minilm_l6_v2 [--cache DIR]
        [--uniform uint4-g32,int4to8p2-asym-g32] [--importance fisher] [--budgets 4bits] [--mixed int3to4,int4to5]

Uniform formats first, then for every budget an allocation without and one with the formats of two widths. All are
rounded to nearest; `importance` weighs the errors, and so says which groups are promoted. The loss is the squared error
of the outputs over their power. Prints one JSON object a row.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from qcompiler.budget import bits_per_weight
from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.measure.cache import Cache
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.progress import Terminal

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets import feeds

BATCH, MOST = 16, 192  # samples that are run together, and at most


class Judge:
    """A model, and what its float form answers on the public split."""

    def __init__(self, assets: Path, name: str, cache: Path | None) -> None:
        self._path, self._cache = assets / "models" / f"{name}.onnx", cache
        calibration, public = feeds(assets, name, "calib"), feeds(assets, name, "public")
        if calibration is None or public is None:
            raise SystemExit(f"there is no data for {name}")
        self._calibration = calibration
        model = self.fresh()
        self._batches = list(Calibration.from_arrays(public, model.ir).batches(BATCH, MOST))
        self._truth = [Runner(model.ir)(batch) for batch in self._batches]

    def fresh(self) -> Model:
        """The float model with its calibration data."""
        model = load_onnx(self._path)
        model.calibration = Calibration.from_arrays(self._calibration, model.ir)
        model.cache = None if self._cache is None else Cache(self._cache)
        return model

    def row(self, what: str, plan: Uniform | Allocate, importance: str) -> None:
        """Print what a plan loses."""
        model = self.fresh()
        plan.run(model, Terminal())
        bits, predicted = bits_per_weight(model), model.plan.solution.get("predicted_loss")
        Nearest(importance=importance).run(model, Terminal())  # type: ignore[arg-type]
        InsertQDQ().run(model, Terminal())
        runner = Runner(model.ir)
        error = power = 0.0
        for batch, truth in zip(self._batches, self._truth, strict=True):
            found = runner(batch)
            for name, exact in truth.items():
                error += float(np.square(found[name] - exact, dtype=np.float64).sum())
                power += float(np.square(exact, dtype=np.float64).sum())
        row = {"plan": what, "importance": importance, "bits": bits, "predicted": predicted, "loss": error / power}
        print(json.dumps(row), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="groups of two widths against formats of one")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--model", default="minilm_l6_v2")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--uniform", default="uint4-g32,int4to8p2-asym-g32,int4to6p5-asym-g32,int4to5p10-asym-g32")
    parser.add_argument("--importance", default="fisher", choices=("none", "activations", "fisher"))
    parser.add_argument("--budgets", default="3.5bits,4bits")
    parser.add_argument("--mixed", default="int3to4,int4to5")
    parser.add_argument("--seconds", type=float, default=1000.0, help="that measuring may take")
    args = parser.parse_args()
    judge = Judge(args.assets, args.model, args.cache)
    for spec in filter(None, args.uniform.split(",")):
        judge.row(spec, Uniform(spec=spec), args.importance)
    for budget in filter(None, args.budgets.split(",")):
        for mixed in ((), tuple(args.mixed.split(","))):
            what = " ".join(("allocate", budget, *mixed))
            judge.row(what, Allocate(budget=budget, mixed_blocks=mixed, seconds=args.seconds), args.importance)


if __name__ == "__main__":
    main()
