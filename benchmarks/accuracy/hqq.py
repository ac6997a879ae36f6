"""Acceptance test of HQQ (Badri and Shaji 2023): scales by half-quadratic splitting, without any data.

Claims, for weights rounded to nearest in asymmetric groups, at equal bytes:

1. at 3 and 2 bits it is better than min-max, by more than 0.3 dB, on the first blocks of smollm2_135m and of
   minilm_l6_v2;
2. it is no better than the search for the least squared error ("mse"), which has no need of data either: squares are
   what the output's error is made of.

Control: weights drawn from a uniform distribution. Their ends are no outliers, min-max is the best that there is, and
HQQ gains at most 0.1 dB over it.

No data is used, so that seeds draw the weights of the control, and the arms on real weights are measured once.

    python benchmarks/accuracy/hqq.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from harness import SEEDS, Claim, assets_folder, fixture, measure

from qcompiler.formats.fit import METHODS
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest

SPECS = ("uint3-asym-g64", "uint2-asym-g32")


def uniform_weights(model: Model, seed: int) -> None:
    """Weights as large as they were, but without tails."""
    rng = np.random.default_rng(seed)
    for site in find_sites(model.ir):
        if site.op == "Gather":
            continue
        array = site.weight.const_value.numpy()  # type: ignore[union-attr]
        reach = float(np.sqrt(3 * np.square(array).mean()))
        site.weight.const_value = ir.tensor(
            rng.uniform(-reach, reach, array.shape).astype(np.float32), name=site.weight.name
        )


def main(assets: Path) -> None:
    claim = Claim("hqq: half-quadratic scales and zero points, data-free (HQQ)")
    for name in ("smollm2_135m", "minilm_l6_v2"):
        case = fixture(assets, name, 4, samples=4)
        for spec in SPECS:
            label = f"{name}, {spec}"
            for method in METHODS:
                passes = [Uniform(spec, embeddings="float"), Nearest(method)]
                claim.record(label, method, measure(case, passes))
            claim.better(label, "hqq", "minmax", 0.3)
            claim.vanishes(label, "hqq", "mse", 0.0)
        label = f"uniform weights, {name}"
        for seed in SEEDS:
            flat = case.changed(partial(uniform_weights, seed=seed))
            for method in ("minmax", "hqq"):
                passes = [Uniform(SPECS[0], embeddings="float"), Nearest(method)]
                claim.record(label, method, measure(flat, passes))
        claim.vanishes(label, "hqq", "minmax", 0.1)
    claim.show()


if __name__ == "__main__":
    main(assets_folder())
