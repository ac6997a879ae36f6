"""COMET: W4A4 with 8 bits for the few blocks of channels that hold the outliers.

    python benchmarks/accuracy/comet.py --assets ~/.cache/qc-assets

Claims (COMET, 2410.12168; systems.md, row 9), on the first blocks of SmolLM2, weights of 4 bits to nearest:

1. With three quarters of the blocks or more at 4 bits, sorted channels are within 1 dB of 8 bits everywhere (W4A8) and
   more than 3 dB better than 4 bits everywhere (W4A4).
2. It is the order that does it: better by more than 1 dB than as many blocks that are moved whole.

Control: the residual stream is rotated first, so that no channel of it stands out. For the products that read it,
sorting gains nothing over whole blocks then. (What other products read is left out of both arms, and shown without
the rotation too.)
"""

from __future__ import annotations

from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.errors import Refusal
from qcompiler.graph.folds import find_stream
from qcompiler.graph.sites import find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.channel_order import ChannelOrder
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import Pass, Pipeline

BLOCKS, SIZE, MOST = 3, 64, 0.25
NARROW, TABLE = "int4-sym-channel-fp16", "int8-sym-channel-fp16"


def plan(bits: int) -> Uniform:
    """W4, and rows of so many bits where no transform asks for more."""
    clip = 0.9 if bits == 4 else 1.0
    return Uniform(NARROW, "dynamic", TABLE, activation_bits=bits, activation_clip=clip)


def ordered(order: str, keep: tuple[str, ...] = ()) -> ChannelOrder:
    """A quarter of the blocks at 8 bits."""
    return ChannelOrder(SIZE, theta=0.0, most=MOST, order=order, keep=keep)  # type: ignore[arg-type]


def others(model: Model) -> tuple[str, ...]:
    """Sites that do not read the residual stream."""
    found = find_stream(model.ir, residual_streams(model.ir)[0].values[0])
    assert not isinstance(found, Refusal)
    readers = {turn.node for turn in found.readers}
    return tuple(site.name for site in find_sites(model.ir) if not readers & set(site.users))


def run(claim: Claim, case: str, found: Fixture, arms: dict[str, list[Pass]]) -> None:
    """Record all arms of one seed."""
    for arm, passes in arms.items():
        measured = measure(found, [*passes, Nearest()])
        claim.record(case, arm, measured)
        panels = measured.reports[0].metrics.get("panels", {}).values()
        if panels:
            high, blocks = (sum(facts[key] for facts in panels) for key in ("high blocks", "blocks"))
            print(f"    {high} of {blocks} blocks at 8 bits")


def main() -> None:
    """Print the table and whether the claims hold."""
    assets, claim = assets_folder(), Claim("COMET: W4A4 with blocks at 8 bits (SmolLM2, first blocks)")
    for seed in SEEDS:
        real = fixture(assets, "smollm2_135m", BLOCKS, seed=seed)
        sorted_or_not: dict[str, list[Pass]] = {n: [ordered(n), plan(4)] for n in ("blocks", "channels")}
        few: list[Pass] = [ChannelOrder(SIZE, theta=4.0, most=MOST), plan(4)]
        everything: dict[str, list[Pass]] = {"W4A4": [plan(4)], "W4A8": [plan(8)], **sorted_or_not, "theta 4": few}
        run(claim, "all products", real, everything)
        rest = others(real.model)
        part: dict[str, list[Pass]] = {n: [ordered(n, rest), plan(4)] for n in ("blocks", "channels")}
        run(claim, "readers of the stream", real, part)
        rotated = real.changed(lambda model, seed=seed: Pipeline([Rotate(seed=seed)], verify=False).run(model))
        run(claim, "rotated stream", rotated, part)
    claim.better("all products", "channels", "W4A8", by=-1.0)
    claim.better("all products", "channels", "W4A4", by=3.0)
    claim.better("all products", "channels", "blocks", by=1.0)
    claim.better("readers of the stream", "channels", "blocks", by=1.0)
    claim.vanishes("rotated stream", "channels", "blocks", within=0.3)
    claim.show()


if __name__ == "__main__":
    main()
