"""Acceptance test of `adadim` (AdaDim, Heo et al. 2024): along which axis of each weight the groups of its scales lie.

Claims, at 3 bits in groups of 64, on the first block of smollm2_135m and on minilm_l6_v2, at
equal bytes:

1. rounded to nearest, the mix that `adadim` chooses is better than groups of columns everywhere and than groups of rows
   everywhere;
2. rounded by `gptq` too.

Control: weights drawn from a normal distribution. No channel of them is larger
than another, so that the mix gains at most 0.2 dB over the better of both axes.

    python benchmarks/accuracy/adadim.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.adadim import AdaDim
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.pipeline import Pass

BLOCKS = {"smollm2_135m": 1, "minilm_l6_v2": None}
CONTROL = "normal weights, nearest"
COLUMNS, ROWS, MIX = "groups of columns", "groups of rows", "adadim"
PLANS: dict[str, list[Pass]] = {
    COLUMNS: [Uniform("uint3-asym-g64", embeddings="float")],
    ROWS: [Uniform("uint3-asym-r64", embeddings="float")],
    MIX: [Uniform("uint3-asym-g64", embeddings="float"), AdaDim(samples=8)],
}
ROUNDINGS: dict[str, Pass] = {"nearest": Nearest(), "gptq": GPTQ()}


def normal_weights(model: Model, seed: int) -> None:
    """Weights as large as they were, without any structure."""
    rng = np.random.default_rng(seed)
    for site in find_sites(model.ir):
        if site.op == "Gather":
            continue
        array = site.weight.const_value.numpy()  # type: ignore[union-attr]
        drawn = rng.normal(0, float(np.sqrt(np.square(array).mean())), array.shape)
        site.weight.const_value = ir.tensor(drawn.astype(np.float32), name=site.weight.name)


def compare(claim: Claim, case: Fixture, label: str, rounding: Pass) -> None:
    for arm, plan in PLANS.items():
        found = measure(case, [*plan, rounding])
        claim.record(label, arm, found)
        if arm == MIX:
            errors = found.reports[1].metrics["relative_error"].values()
            turned = sum(e["rows"] < e["columns"] for e in errors)
            print(f"  {label}: groups of rows on {turned} of {len(errors)} layers", flush=True)


def main(assets: Path) -> None:
    for name, blocks in BLOCKS.items():
        claim = Claim(f"adadim: the axis of the groups, layer by layer (AdaDim), {name}")
        for seed in SEEDS:
            case = fixture(assets, name, blocks, seed=seed, samples=8, public=4)
            for rounding, one in ROUNDINGS.items():
                compare(claim, case, rounding, one)
            compare(claim, case.changed(partial(normal_weights, seed=seed)), CONTROL, ROUNDINGS["nearest"])
        for rounding in ROUNDINGS:
            for fixed in (COLUMNS, ROWS):
                claim.better(rounding, MIX, fixed)
        for values in zip(claim.values[CONTROL, COLUMNS], claim.values[CONTROL, ROWS], strict=True):
            claim.record(CONTROL, "better of both", max(values))
        claim.vanishes(CONTROL, MIX, "better of both", 0.2)
        claim.show()


if __name__ == "__main__":
    main(assets_folder())
