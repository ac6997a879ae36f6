"""LoRC (methods.md B10, systems.md row 49): a branch for the rounding error, plain and weighed by the input.

    nice -n 5 python benchmarks/accuracy/lorc.py --assets ~/.cache/qc-assets

Claim, written before the run: with weights of 3 bits in groups of 64, rounded to nearest, a branch of at most a quarter
of a bit per weight gains more than 1 dB over none, more than 0.5 dB over spending the same bytes on groups of 32, and
the one that knows the input gains more than 1 dB over the plain one (QERA against LoRC). Behind GPTQ, which corrects
itself along the same directions, it beats groups of 32 by more than 0. Control: with Gaussian weights and gains of one
it gains at most 0.5 dB over groups of 32, and the input says at most 0.5 dB more than the plain error.
"""

from __future__ import annotations

from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure
from svdquant import KEPT, MODELS, gaussian

from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.lorc import LoRC
from qcompiler.pipeline import Pass

SHARE = 0.25
COARSE, FINE = (Uniform(f"uint3-asym-g{group}-fp16", keep=KEPT) for group in (64, 32))


def nearest_arms() -> dict[str, list[Pass]]:
    """To nearest; the branch is searched for what rounding then leaves."""
    return {
        "g64": [COARSE, Nearest()],
        "g32": [FINE, Nearest()],
        "plain": [COARSE, LoRC("plain", share=SHARE), Nearest()],
        "slim": [COARSE, LoRC("slim", share=SHARE), Nearest()],
        "input": [COARSE, LoRC("input", share=SHARE), Nearest()],
    }


def gptq_arms() -> dict[str, list[Pass]]:
    """By GPTQ; the branch comes behind and the codes stay."""
    return {
        "g32": [FINE, GPTQ()],
        "input": [COARSE, GPTQ(), LoRC("input", share=SHARE)],
    }


def run(claim: Claim, case: str, found: Fixture, arms: dict[str, list[Pass]]) -> None:
    """All arms, at no more bytes for a branch than for the finer groups."""
    sizes: dict[str, int] = {}
    for arm, passes in arms.items():
        measured = measure(found, passes)
        sizes[arm] = measured.bytes
        claim.record(case, arm, measured)
    if any(sizes[arm] > sizes["g32"] for arm in sizes):
        raise SystemExit("a branch stores more than finer groups")


def main() -> None:
    """Measure, print the table and the verdicts."""
    assets = assets_folder()
    for name, blocks in MODELS:
        claim = Claim(f"Low-rank correction of the rounding error (2303.08302, 2410.06040), {name}")
        nearest, gptq, flat = f"{name} W3", f"{name} W3 gptq", f"gaussian {name} W3"
        for seed in SEEDS:
            found = fixture(assets, name, blocks, seed=seed)
            run(claim, nearest, found, nearest_arms())
            run(claim, gptq, found, gptq_arms())
            control = {arm: passes for arm, passes in nearest_arms().items() if arm in ("g32", "plain", "input")}
            run(claim, flat, found.changed(gaussian), control)
        claim.better(nearest, "input", "g64", 1.0)
        claim.better(nearest, "input", "g32", 0.5)
        claim.better(nearest, "input", "plain", 1.0)
        claim.better(nearest, "plain", "g64")
        claim.better(gptq, "input", "g32")
        claim.vanishes(flat, "input", "g32", 0.5)
        claim.vanishes(flat, "input", "plain", 0.5)
        claim.show()


if __name__ == "__main__":
    main()
