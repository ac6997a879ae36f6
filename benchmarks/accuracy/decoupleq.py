"""Acceptance test of `decoupleq` (decoupleQ, Guo et al. 2024): codes and scales by turns.

Claims, against `gptq` as it is by default (with three sweeps of descent over codes and scales), at equal bytes:

1. with the Hessians of the float model, the same for both, the error of the output is smaller on at least 95 percent of
   the layers, at 2 bits in groups of 64 and with one scale a row (first seed);
2. at 2 bits, the model's output is better, on data that calibration never saw (median above 0.1 dB);
3. at 3 bits the gain is smaller: recorded (first seed), nothing claimed.

Controls: at 8 bits no weight is clipped and few codes can be better, so that 0.3 dB are not gained; and white inputs
(the Hessian is the identity), where rounding to nearest is the best for given scales: the objective gains at most
0.1 dB on the weights of the same model.

    python benchmarks/accuracy/decoupleq.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
from harness import SEEDS, Claim, Fixture, Measured, assets_folder, fixture, measure

from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.decoupleq import DecoupleQ
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.gptq_core import factorize, gptq_round, hessian_loss

COARSE = ("uint2-asym-g64", "uint2-asym-channel")
FINER = ("uint3-asym-g64", "uint8-asym-g64")
BLOCKS = {"smollm2_135m": 1, "minilm_l6_v2": None}
ROUNDINGS = {"gptq": GPTQ, "decoupleq": DecoupleQ}


def arm(case: Fixture, spec: str, name: str, *, sequential: bool = True) -> Measured:
    """One rounding in one format; the table of the embedding stays float."""
    return measure(case, [Uniform(spec, embeddings="float"), ROUNDINGS[name](sequential=sequential)])


def objectives(case: Fixture, spec: str, name: str) -> dict[str, float]:
    """Relative error of every layer's output, all with the inputs of the float model."""
    found = arm(case, spec, name, sequential=False).reports[1].metrics["relative_error"]
    return {site: errors["error"] for site, errors in found.items()}


def white(case: Fixture, spec: str) -> dict[str, float]:
    """The objective of both roundings in dB over all layers, where inputs are white."""
    gains: dict[str, list[float]] = {name: [] for name in ROUNDINGS}
    for site in find_sites(case.model.ir):
        if site.op == "Gather":
            continue
        matrix, factor = site.matrix(), factorize(np.eye(site.columns))
        start = gptq_round(matrix, factor, [quantize(matrix, parse_spec(spec))])
        for name, kind in ROUNDINGS.items():
            (found,) = kind().improve(matrix, factor, start)
            loss = hessian_loss(found.decode() - matrix, factor.hessian).sum()
            gains[name].append(-10 * np.log10(loss / np.square(matrix, dtype=np.float64).sum()))
    return {name: median(values) for name, values in gains.items()}


def compare_layers(claim: Claim, case: Fixture) -> None:
    """On how many layers the objective is smaller."""
    for spec in COARSE:
        plain, turned = (objectives(case, spec, rounding) for rounding in ROUNDINGS)
        share = float(np.mean([turned[site] < plain[site] for site in plain]))
        ratio = float(np.exp(np.mean([np.log(turned[site] / plain[site]) for site in plain])))
        print(f"  {spec}: objective smaller on {share:.0%} of layers, {ratio:.3f} of gptq's", flush=True)
        claim.record(f"layers, {spec}", "percent smaller", 100 * share)
        claim.record(f"layers, {spec}", "asked for", 95)


def main(assets: Path) -> None:
    for name, blocks in BLOCKS.items():
        claim = Claim(f"decoupleq: codes and scales by turns (decoupleQ), {name}")
        for seed in SEEDS:
            case = fixture(assets, name, blocks, seed=seed, samples=8, public=4)
            for spec in COARSE:
                for rounding in ROUNDINGS:
                    claim.record(spec, rounding, arm(case, spec, rounding))
            if seed == SEEDS[0]:
                compare_layers(claim, case)
                for spec in FINER:
                    for rounding in ROUNDINGS:
                        claim.record(spec, rounding, arm(case, spec, rounding))
        for spec in COARSE:
            claim.better(spec, "decoupleq", "gptq", 0.1)
            claim.better(f"layers, {spec}", "percent smaller", "asked for", -1e-6)
            for rounding, value in white(case, spec).items():  # type: ignore[reportPossiblyUnboundVariable]
                claim.record(f"white inputs, {spec}", rounding, value)
            claim.vanishes(f"white inputs, {spec}", "decoupleq", "gptq", 0.1)
        claim.vanishes(FINER[-1], "decoupleq", "gptq", 0.3)
        claim.show()


if __name__ == "__main__":
    main(assets_folder())
