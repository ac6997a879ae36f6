"""Acceptance test of HQQ (Badri and Shaji 2023): scales by half-quadratic splitting, without any data.

Claims, for weights rounded to nearest in asymmetric groups, at equal bytes:

1. at 3 and 2 bits it is better than min-max, by more than 0.3 dB, on the first blocks of smollm2_135m and on
   minilm_l6_v2;
2. it is no better than the search for the least squared error ("mse"), which has no need of data either: squares are
   what the output's error is made of.

Control: a matrix drawn from a uniform distribution, where min-max ends are no outliers: HQQ gains at most 0.1 dB over
it (of the weights; through a model of random weights the noise of the output says little). Found: this does not hold
at 2 and 3 bits, where half a step cut off both ends of a uniform distribution is a gain of its own, and hardly at 8.

No data is used: seeds draw the control, and the arms on real weights are measured once.

    python benchmarks/accuracy/hqq.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import SEEDS, Claim, assets_folder, fixture, measure

from qcompiler.formats import parse_spec
from qcompiler.formats.fit import METHODS, Method, quantize
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest

SPECS = ("uint3-asym-g64", "uint2-asym-g32")
BLOCKS = {"smollm2_135m": 4, "minilm_l6_v2": None}


def weight_sqnr(matrix: np.ndarray, spec: str, method: Method) -> float:
    """Power of a weight over that of its rounding error, dB."""
    error = quantize(matrix, parse_spec(spec), method).decode() - matrix
    return float(10 * np.log10(np.square(matrix).sum() / np.square(error).sum()))


def main(assets: Path) -> None:
    claim = Claim("hqq: half-quadratic scales and zero points, data-free (HQQ)")
    for name, blocks in BLOCKS.items():
        case = fixture(assets, name, blocks, samples=4)
        for spec in SPECS:
            label = f"{name}, {spec}"
            for method in METHODS:
                passes = [Uniform(spec, embeddings="float"), Nearest(method)]
                claim.record(label, method, measure(case, passes))
            claim.better(label, "hqq", "minmax", 0.3)
            claim.vanishes(label, "hqq", "mse", 0.0)
    for spec in (*SPECS, "uint8-asym-g64"):
        for seed in SEEDS:
            drawn = np.random.default_rng(seed).uniform(-1, 1, (512, 768)).astype(np.float32)
            for method in METHODS:
                claim.record(f"uniform weights, {spec}", method, weight_sqnr(drawn, spec, method))
        claim.vanishes(f"uniform weights, {spec}", "hqq", "minmax", 0.1)
    claim.show()


if __name__ == "__main__":
    main(assets_folder())
