"""W4A8 and W4A4 on whole models, activations rounded row by row: rotations, ResQ, and SVDQuant against smoothing.

    nice -n 5 python benchmarks/accuracy/whole_models.py --assets ~/.cache/qc-assets [--models a,b] [--seeds 3]
        [--bits 4,8] [--roundings nearest,gptq] [--arms rotations,branches]

Claims (QuaRot 2404.00456, ResQ 2412.14363, SVDQuant 2411.05007), at equal bytes:

1. resq better than hadamard better than plain, in all layers of SmolLM2. ResQ has an eighth of the directions of the
   stream, and of what other products read, at 8 bits; the others may spend that on groups of 20 instead of 64.
2. The same order on MiniLM, whose norms stand behind the sums, so that no stream can be turned: there hadamard are
   small explicit products in front of every matrix, and resq keeps the strongest channels apart from them.
3. SVDQuant (groups of 64, a quarter of a bit for the branch) better than smoothing (groups of 32).

All to nearest and by GPTQ (short: 2048 tokens, no descent). Figures are signal to noise of the outputs in dB: logits
of 8 windows of 512 tokens, embeddings of 64 texts; beside it the KL divergence of the next token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness import SEEDS, Claim, Fixture, fixture, measure

from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.awq import AWQ
from qcompiler.passes.transform.channel_order import ChannelOrder
from qcompiler.passes.transform.pca_split import PCASplit
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.passes.transform.svdquant import SVDQuant
from qcompiler.pipeline import Pass

WIDE = "int8-sym-g64-fp16"
TABLE = "int8-sym-channel-fp16"  # of tokens, alike in all arms
ROUNDINGS: dict[str, Pass] = {"nearest": Nearest(), "gptq": GPTQ(tokens=2048, sweeps=0)}
MODELS = {"smollm2_135m": 8, "minilm_l6_v2": 64}  # and samples to judge by


def plan(group: int, bits: int) -> Uniform:
    """Weights of 4 bits in groups, rows of `bits`; 8 bits for both where a transform asks for more."""
    clip = 0.9 if bits == 4 else 1.0
    return Uniform(f"int4-sym-g{group}-fp16", "dynamic", TABLE, high=WIDE, activation_bits=bits, activation_clip=clip)


def rotations(name: str, bits: int, seed: int) -> dict[str, Sequence[Pass]]:
    """Claims 1 and 2: resq has groups of 64 and an eighth of the inputs at 8 bits, the others groups of 20."""
    turned = Rotate(seed=seed, heads=True, online=True)
    split = ChannelOrder(block=32, theta=0.0, most=0.125)
    resq = [turned, PCASplit(seed=seed), split] if name == "smollm2_135m" else [split, turned]
    return {"plain": [plan(20, bits)], "hadamard": [turned, plan(20, bits)], "resq": [*resq, plan(64, bits)]}


def branches(bits: int) -> dict[str, Sequence[Pass]]:
    """Claim 3."""
    fine, coarse = plan(32, bits), plan(64, bits)
    return {
        "smooth 0.5": [fine, Smooth(sites="all")],
        "smooth 0.8": [fine, Smooth(0.8, sites="all")],
        "awq": [fine, AWQ(grid=10)],
        "svdquant": [coarse, SVDQuant(share=0.25, grid=8, sweeps=10)],
    }


def run(claim: Claim, case: str, found: Fixture, arms: dict[str, Sequence[Pass]], rounding: Pass) -> None:
    """Record all arms of one seed."""
    for arm, passes in arms.items():
        measured = measure(found, [*passes, rounding])
        claim.record(case, arm, measured)
        if measured.kl is not None:
            print(f"    KL {measured.kl:.4f}", flush=True)


def main() -> None:
    """Print a table a model, and whether the claims hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--roundings", default=",".join(ROUNDINGS))
    parser.add_argument("--arms", default="rotations,branches")
    args = parser.parse_args()
    for name in args.models.split(","):
        claim = Claim(f"Rows of 4 and 8 bits on all of {name}")
        for seed in SEEDS[: args.seeds]:
            found = fixture(args.assets, name, seed=seed, samples=32, public=MODELS[name])
            for bits in map(int, args.bits.split(",")):
                for how in args.roundings.split(","):
                    if "rotations" in args.arms:
                        run(claim, f"W4A{bits} {how}", found, rotations(name, bits, seed), ROUNDINGS[how])
                    if "branches" in args.arms:
                        run(claim, f"W4A{bits} {how}, branch", found, branches(bits), ROUNDINGS[how])
        for case in [case for case, arm in claim.values if arm == "resq"]:
            claim.better(case, "resq", "hadamard")
            claim.better(case, "hadamard", "plain")
        for case in [case for case, arm in claim.values if arm == "svdquant"]:
            for arm in ("smooth 0.5", "smooth 0.8", "awq"):
                claim.better(case, "svdquant", arm)
        claim.show()


if __name__ == "__main__":
    main()
