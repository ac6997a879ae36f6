"""ResQ: at W4A4, the strongest eighth of the directions of the residual stream at 8 bits.

    python benchmarks/accuracy/resq.py --assets ~/.cache/qc-assets

Claims (ResQ, 2412.14363; systems.md, row 55), on the first blocks of SmolLM2 with 4 bits and a clip of 0.9 for rows:

1. resq better than hadamard better than plain rounding, to nearest and by GPTQ. What resq stores more (an eighth of the
   columns at 8 bits) the others may spend on scales of groups of 40.
2. With an eighth of the inputs of *all* products at 8 bits: the channels that reach furthest, the same behind a
   Hadamard rotation of the stream, and directions of the stream with channels elsewhere. The last is better than both.
3. Directions of values within heads are better than the channels of what attentions hand on that reach furthest, as
   many of them.

Control: the same architecture with random weights on random tokens, so that the stream has nearly the same power in all
directions. (A rotation of the model would not do: it leaves the strong directions strong, only no longer along
channels; nor does whitening: few tokens make up much of a text, each of them one direction behind the first norm.)
Directions have no advantage over any other channels of a rotated stream then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.calibration import Calibration
from qcompiler.graph.sites import find_sites
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.channel_order import ChannelOrder
from qcompiler.passes.transform.pca_split import PCASplit
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import Pass

BLOCKS = 3
NARROW, FINE, WIDE = "int4-sym-channel-fp16", "int4-sym-g40-fp16", "int8-sym-channel-fp16"
SPLIT = ChannelOrder(block=64, theta=0.0, most=0.125)
FINER = ChannelOrder(block=8, theta=0.0, most=0.125)  # as many channels as an eighth of each head has


def plan(spec: str = NARROW, table: str = "float") -> Uniform:
    """W4A4; 8 bits where a transform asks for more. The table of tokens is alike in all arms."""
    return Uniform(spec, "dynamic", table, high=WIDE, activation_bits=4, activation_clip=0.9)


def isotropic(found: Fixture, seed: int) -> Fixture:
    """The architecture with random weights, each matrix as large as it was, on random tokens: its own reference."""
    rng = np.random.default_rng(seed)
    model = found.model.clone()
    for site in find_sites(model.ir):
        tensor = site.weight.const_value
        assert tensor is not None
        array = rng.standard_normal(site.shape, np.float32) * np.float32(tensor.numpy().std())
        site.weight.const_value = ir.tensor(array.astype(tensor.dtype.numpy()), name=site.weight.name)
    rows = next(site.rows for site in find_sites(model.ir) if site.op == "Gather")

    def random(feed: Mapping[str, Any]) -> dict[str, Any]:
        return {k: rng.integers(0, rows, v.shape, v.dtype) if v.max() > 1 else v for k, v in feed.items()}

    assert model.calibration is not None
    batches = [random(feed) for feed in model.calibration.batches(1)]
    arrays = {name: np.concatenate([feed[name] for feed in batches]) for name in batches[0]}
    model.calibration = Calibration.from_arrays(arrays, model.ir)
    return replace(found, model=model, public=[random(feed) for feed in found.public])


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


def values(seed: int) -> dict[str, list[Pass]]:
    """Claim 3: the same at 8 bits, but for which directions of values."""
    arms = {"channels of values": PCASplit(seed=seed), "bases of values": PCASplit(heads=True, seed=seed)}
    return {arm: [item, FINER, plan()] for arm, item in arms.items()}


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
        run(claim, "values", real, values(seed), Nearest())
        control = {arm: passes for arm, passes in splits(seed).items() if arm != "channels"}
        random = isotropic(real, seed)
        run(claim, "random weights", random, control, Nearest())
        run(claim, "values, random weights", random, values(seed), Nearest())
        run(claim, "GPTQ", fixture(assets, "smollm2_135m", 1, seed=seed), arms(seed), GPTQ())
    for case in ("nearest", "GPTQ"):
        claim.better(case, "resq", "hadamard")
        claim.better(case, "hadamard", "plain")
    claim.better("an eighth at 8 bits", "resq, channels", "channels")
    claim.better("an eighth at 8 bits", "resq, channels", "hadamard, channels")
    claim.better("values", "bases of values", "channels of values")
    claim.vanishes("values, random weights", "bases of values", "channels of values", within=0.3)
    claim.vanishes("random weights", "resq, channels", "hadamard, channels", within=0.3)
    claim.show()


if __name__ == "__main__":
    main()
