"""QUAD: at W4A4, a ninth more channels for the residual stream, which hold its strongest directions at 8 bits.

    python benchmarks/accuracy/quad.py --assets ~/.cache/qc-assets

Claim (QUAD, 2503.19353; systems.md, row 68), on the first blocks of SmolLM2, to nearest: better by more than 1 dB than
rotation alone, which may spend the bytes of the wider products on scales of groups of 12. (The table of tokens becomes
wider too, so that QUAD still stores 7 % more: the bytes are in the table. Found: it does not hold, 0.6 dB.)

Control: random weights and tokens, as for ResQ. A ninth of the power at 8 bits is then all that the appended
directions take from the rest: 0.5 dB. The gain is at most 0.8 dB.
"""

from __future__ import annotations

from harness import SEEDS, Claim, assets_folder, fixture
from resq import BLOCKS, WIDE, isotropic, plan, run

from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.pca_split import PCASplit
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import Pass


def main() -> None:
    """Print the table and whether the claim holds."""
    assets, claim = assets_folder(), Claim("QUAD at W4A4 (SmolLM2, first blocks)")
    for seed in SEEDS:
        real = fixture(assets, "smollm2_135m", BLOCKS, seed=seed)
        table: dict[str, list[Pass]] = {
            "hadamard": [Rotate(seed=seed), plan("int4-sym-g12-fp16", WIDE)],
            "quad": [PCASplit(share=1 / 9, append=True, seed=seed), plan(table=WIDE)],
        }
        run(claim, "nearest", real, table, Nearest())
        run(claim, "random weights", isotropic(real, seed), table, Nearest())
    claim.better("nearest", "quad", "hadamard", by=1.0)
    claim.vanishes("random weights", "quad", "hadamard", within=0.8)
    claim.show()


if __name__ == "__main__":
    main()
