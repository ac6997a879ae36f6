"""ResQ: at W4A4, the strongest eighth of the directions of the residual stream at 8 bits.

    python benchmarks/accuracy/resq.py --assets ~/.cache/qc-assets

Claims (ResQ, 2412.14363; systems.md, row 55), on the first blocks of SmolLM2 with 4 bits and a clip of 0.9 for rows:

1. resq better than hadamard better than plain rounding, to nearest and by GPTQ. What resq stores more (an eighth of the
   columns at 8 bits) the others may spend on scales of groups of 40.
2. With an eighth of the inputs of *all* products at 8 bits: the channels that reach furthest, the same behind a
   Hadamard rotation of the stream, and directions of the stream with channels elsewhere. The last is better than both.

Control: the stream is made isotropic first, by a matrix that takes its mean second moments to the identity (a rotation
would leave the strong directions where they are, only no longer along channels). Directions have no advantage over any
other channels of a rotated stream then.
"""

from __future__ import annotations

import numpy as np
from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.errors import Refusal
from qcompiler.graph.folds import find_stream
from qcompiler.graph.folds.apply import commit, read
from qcompiler.graph.topology import residual_streams
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.channel_order import ChannelOrder
from qcompiler.passes.transform.pca_split import PCASplit, moments
from qcompiler.passes.transform.rotate import Rotate, without_gains
from qcompiler.pipeline import Pass

BLOCKS = 3
NARROW, FINE, WIDE = "int4-sym-channel-fp16", "int4-sym-g40-fp16", "int8-sym-channel-fp16"
SPLIT = ChannelOrder(block=64, theta=0.0, most=0.125)


def plan(spec: str = NARROW) -> Uniform:
    """W4A4; 8 bits where a transform asks for more."""
    return Uniform(spec, "dynamic", WIDE, high=WIDE, activation_bits=4, activation_clip=0.9)


def isotropic(model: Model) -> None:
    """Make the stream's mean second moments nearly the identity; another function, and its own reference."""
    for _ in range(3):
        found = find_stream(model.ir, residual_streams(model.ir)[0].values[0])
        assert not isinstance(found, Refusal)
        free = without_gains(model.ir, found)
        assert not isinstance(free, Refusal)
        stream = free[0]
        power, basis = np.linalg.eigh(moments(model, stream) * stream.width)
        root = np.sqrt(np.maximum(power, 1e-4))
        white, back = (basis / root) @ basis.T, (basis * root) @ basis.T  # both symmetric
        changes = {}
        for matrix, turns in ((white, stream.writers), (back, stream.readers)):
            for turn in turns:
                value = turn.constant.value
                array = np.tensordot(changes.get(value, read(value)), matrix, ([turn.axis], [0]))
                changes[value] = np.moveaxis(array, -1, turn.axis)
        commit(changes)


def arms(seed: int) -> dict[str, list[Pass]]:
    """Claim 1: equal bytes, or more of them for those that resq is compared with."""
    return {"plain": [plan(FINE)], "hadamard": [Rotate(seed=seed), plan(FINE)], "resq": [PCASplit(seed=seed), plan()]}


def splits(seed: int) -> dict[str, list[Pass]]:
    """Claim 2: an eighth at 8 bits everywhere."""
    return {
        "channels": [SPLIT, plan()],
        "hadamard, channels": [Rotate(seed=seed), SPLIT, plan()],
        "resq, channels": [PCASplit(seed=seed), SPLIT, plan()],
    }


def run(claim: Claim, case: str, found: Fixture, table: dict[str, list[Pass]], rounding: Pass) -> None:
    """Record all arms of one seed."""
    for arm, passes in table.items():
        measured = measure(found, [*passes, rounding])
        claim.record(case, arm, measured)
        for name, facts in measured.reports[0].metrics.get("streams", {}).items():
            if "power" in facts:
                print(f"    {name}: {facts['power']:.3f} of the power in {facts['high']} of {facts['width']} channels")


def main() -> None:
    """Print the table and whether the claims hold."""
    assets, claim = assets_folder(), Claim("ResQ at W4A4 (SmolLM2, first blocks)")
    for seed in SEEDS:
        real = fixture(assets, "smollm2_135m", BLOCKS, seed=seed)
        run(claim, "nearest", real, arms(seed), Nearest())
        run(claim, "an eighth at 8 bits", real, splits(seed), Nearest())
        control = {arm: passes for arm, passes in splits(seed).items() if arm != "channels"}
        run(claim, "isotropic stream", real.changed(isotropic), control, Nearest())
        run(claim, "GPTQ", fixture(assets, "smollm2_135m", 1, seed=seed), arms(seed), GPTQ())
    for case in ("nearest", "GPTQ"):
        claim.better(case, "resq", "hadamard")
        claim.better(case, "hadamard", "plain")
    claim.better("an eighth at 8 bits", "resq, channels", "channels")
    claim.better("an eighth at 8 bits", "resq, channels", "hadamard, channels")
    claim.vanishes("isotropic stream", "resq, channels", "hadamard, channels", within=0.3)
    claim.show()


if __name__ == "__main__":
    main()
