"""Acceptance test of the format `qoq4` (QoQ, QServe, Lin et al. 2024): two levels of scales.

Claims, for weights rounded by `gptq`, on the first block of smollm2_135m and on minilm_l6_v2:

1. no code of any weight leaves int8 when its group's scale expands it;
2. in groups of 64, qoq4 is better than uint4 with float16 scales in groups of 96, which takes about the same bytes
   (median above 0 dB);
3. in groups of 128 it stores less than uint4 in groups of 128 and is at most 0.3 dB worse.

Control: with one group a row the first level has nothing to tell the groups apart by; qoq4 gains at most 0.1 dB over
uint4 with one scale a row.

    python benchmarks/accuracy/qoq.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.formats import Progressive
from qcompiler.formats.progressive import split_scales
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.pipeline import Pipeline

BLOCKS = {"smollm2_135m": 1, "minilm_l6_v2": None}
SPECS = (
    "qoq4-asym-g64", "uint4-asym-g96", "qoq4-asym-g128", "uint4-asym-g128", "qoq4-asym-channel", "uint4-asym-channel",
)  # fmt: skip


def expanded(case: Fixture) -> tuple[float, float]:
    """The smallest and the largest number that any code of a rounded model expands to."""
    model = case.model.clone()
    Pipeline([Uniform(SPECS[0], embeddings="float"), GPTQ()], verify=False).run(model)
    ends: list[float] = []
    for tensor in model.weights.values():
        assert isinstance(tensor.spec.format, Progressive)
        assert tensor.zero is not None
        _, inner = split_scales(tensor.scale, tensor.spec.scale_dtype)
        whole = [np.repeat(part, 64, 1)[:, : tensor.shape[1]] for part in (inner, tensor.zero)]
        numbers = (tensor.codes - whole[1]) * whole[0]
        ends += [float(numbers.min()), float(numbers.max())]
    return min(ends), max(ends)


def main(assets: Path) -> None:
    for name, blocks in BLOCKS.items():
        claim = Claim(f"qoq4: whole-number scales of groups within int8, one scale a row (QoQ), {name}")
        for seed in SEEDS:
            case = fixture(assets, name, blocks, seed=seed, samples=8, public=4)
            for spec in SPECS:
                claim.record(name, spec, measure(case, [Uniform(spec, embeddings="float"), GPTQ()]))
            low, high = expanded(case)
            print(f"  {name}: codes expand to {low:.0f} ... {high:.0f}", flush=True)
            claim.record(f"int8, {name}", "largest magnitude", max(-low - 1, high))
            claim.record(f"int8, {name}", "of int8", 127)
        claim.vanishes(f"int8, {name}", "largest magnitude", "of int8", 0.0)
        claim.better(name, "qoq4-asym-g64", "uint4-asym-g96")
        claim.better(name, "qoq4-asym-g128", "uint4-asym-g128", -0.3)
        claim.vanishes(name, "qoq4-asym-channel", "uint4-asym-channel", 0.1)
        claim.show()


if __name__ == "__main__":
    main(assets_folder())
