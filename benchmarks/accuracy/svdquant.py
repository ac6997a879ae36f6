"""SVDQuant (methods.md B10, systems.md row 3): better than smoothing alone at the same bytes, its branch counted.

    nice -n 5 python benchmarks/accuracy/svdquant.py --assets ~/.cache/qc-assets

Claim, written before the run: with groups of 64 and a branch of at most a quarter of a bit per weight, SVDQuant beats
smoothing with groups of 32 (a quarter of a bit for scales), SmoothQuant's at 0.5 and 0.8 and AWQ's, by more than 0.5 dB
at W4, W4A8, W4A4 and W3, rounded to nearest; and by more than 0 dB at W4A4 where GPTQ rounds both. Control: with
Gaussian weights and gains of one there is nothing that a branch could take over: at most 0.5 dB over finer groups.
Factors of int8, which are twice as many in the same bytes, are better than those of float16 (no part of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.awq import AWQ
from qcompiler.passes.transform.factors import FactorBits
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.passes.transform.svdquant import SVDQuant
from qcompiler.pipeline import Pass

KEPT = ("embeddings",)
MODELS = (("smollm2_135m", 1), ("minilm_l6_v2", 1))
SHARE = 0.25  # bits per weight for a branch: what halving groups of 64 costs
CASES: dict[str, tuple[str, dict[str, Any], Pass]] = {
    "W4": ("int4-sym", {}, Nearest()),
    "W4A8": ("int4-sym", {"activation": "dynamic"}, Nearest()),
    "W4A4": ("int4-sym", {"activation": "dynamic", "activation_bits": 4}, Nearest()),
    "W3": ("int3-sym", {}, Nearest()),
    "W4A4 gptq": ("int4-sym", {"activation": "dynamic", "activation_bits": 4}, GPTQ()),
}


def gaussian(model: Model) -> None:
    """Weights and tables Gaussian, gains and biases constant, of the same size: no outliers, no favoured direction."""
    rng = np.random.default_rng(0)
    matrices = {site.weight for site in find_sites(model.ir)}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 64:
            continue
        if value not in matrices and len(tensor.shape) > 1:
            continue
        array = tensor.numpy()
        size = np.sqrt(np.square(array, dtype=np.float64).mean())
        new = size * (rng.standard_normal(array.shape) if value in matrices else np.ones(array.shape))
        value.const_value = ir.tensor(new.astype(np.float32), name=value.name)


FACTORS: dict[str, FactorBits] = {"": 16, ", int8 factors": 8}
BASELINES = ("smooth 0.5 g32", "smooth 0.8 g32", "awq g32")


def arms(case: str) -> dict[str, Sequence[Pass]]:
    """The pipelines that are compared; all plan first, so that every search knows the formats."""
    kind, activation, rounding = CASES[case]
    coarse, fine = (Uniform(f"{kind}-g{group}-fp16", keep=KEPT, **activation) for group in (64, 32))
    transforms = (Smooth(sites="all"), Smooth(0.8, sites="all"), AWQ(grid=10))
    smoothed: dict[str, Sequence[Pass]] = {
        arm: [fine, item, rounding] for arm, item in zip(BASELINES, transforms, strict=True)
    }
    branches: dict[str, Sequence[Pass]] = {
        f"svdquant g64{name}": [coarse, SVDQuant(share=SHARE, grid=8, sweeps=10, factor_bits=bits), rounding]
        for name, bits in FACTORS.items()
    }
    return smoothed | branches


def run(claim: Claim, where: str, found: Fixture, case: str) -> None:
    """All arms of a case, at no more bytes for the branch than for the finer groups."""
    sizes: dict[str, int] = {}
    for arm, passes in arms(case).items():
        measured = measure(found, passes)
        sizes[arm] = measured.bytes
        claim.record(f"{where} {case}", arm, measured)
    if max(size for arm, size in sizes.items() if "svdquant" in arm) > sizes["awq g32"]:
        raise SystemExit("the arms do not store the same")


def main() -> None:
    """Measure, print the table and the verdicts."""
    assets = assets_folder()
    for name, blocks in MODELS:
        claim = Claim(f"SVDQuant against smoothing at the same bytes (2411.05007), {name}")
        for seed in SEEDS:
            found = fixture(assets, name, blocks, seed=seed)
            for case in CASES:
                run(claim, name, found, case)
            run(claim, f"gaussian {name}", found.changed(gaussian), "W4A4")
        for baseline in BASELINES:
            for case, (_, _, rounding) in CASES.items():
                margin = 0.5 if isinstance(rounding, Nearest) else 0.0
                claim.better(f"{name} {case}", "svdquant g64", baseline, margin)
        for case in CASES:
            claim.better(f"{name} {case}", "svdquant g64, int8 factors", "svdquant g64")
        claim.vanishes(f"gaussian {name} W4A4", "svdquant g64", BASELINES[0], 0.5)
        claim.show()


if __name__ == "__main__":
    main()
