"""AWQ (2306.00978): searched scales of channels, folded into what produces them.

Claims, before the run, at equal bytes:

1. on the first blocks of smollm2_135m in int4 (groups of 64) and int3 (groups of 128), and on minilm_l6_v2 in int4,
   scaling before rounding to nearest is better than rounding alone;
2. at 3 bits clipping each group by the error of the output (importance "moments", the products of inputs within a
   group) is better than by the mean squares of the inputs, and scaling is still better before it.

Control: where all channels have one mean magnitude (folded so before), nine
tenths of the gain are gone.
"""

from __future__ import annotations

from statistics import median

from harness import SEEDS, Claim, Fixture, Measured, assets_folder, fixture, measure

from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.awq import AWQ
from qcompiler.passes.transform.inputs import find_folds, layer_inputs
from qcompiler.pipeline import Pass

NARROW = "int3-sym-g128"
CASES = (
    ("smollm2_135m", 2, "int4-sym-g64"),
    ("smollm2_135m", 2, NARROW),
    ("minilm_l6_v2", None, "int4-sym-g64"),
)


def flatten(model: Model) -> None:
    """Give all channels of every input that can be folded one mean magnitude."""
    folds, _ = find_folds(model, layer_inputs(model), lambda _: None)
    axes = {fold.value.name or "": fold.axis for fold in folds}
    found = channel_statistics(model, list(axes), axes)
    for fold in folds:
        size = found[fold.value.name or ""].magnitude
        fold.scale(fold.tied(size.clip(1e-3 * size.max())))


def rounded(model: Fixture, spec: str, nearest: Nearest, *transforms: Pass) -> Measured:
    return measure(model, [Uniform(spec, embeddings="float"), *transforms, nearest])


def main() -> None:
    claim = Claim("AWQ: scaled channels are better than plain ones, at equal bytes")
    assets, clipped = assets_folder(), Nearest(importance="moments")
    for seed in SEEDS:
        for name, blocks, spec in CASES:
            samples, public = (8, 4) if blocks else (16, 64)
            case, plain = f"{name} {spec}", fixture(assets, name, blocks, seed=seed, samples=samples, public=public)
            claim.record(case, "nearest", rounded(plain, spec, Nearest()))
            claim.record(case, "awq", rounded(plain, spec, Nearest(), AWQ(grid=10)))
            if spec == NARROW:
                claim.record(case, "clipped by squares", rounded(plain, spec, Nearest(importance="activations")))
                claim.record(case, "clipped", rounded(plain, spec, clipped))
                scaled = rounded(plain, spec, clipped, AWQ(grid=10, importance="moments"))
                claim.record(case, "awq, clipped", scaled)
                control = plain.changed(flatten)
                claim.record("flat channels", "nearest", rounded(control, spec, Nearest()))
                claim.record("flat channels", "awq", rounded(control, spec, Nearest(), AWQ(grid=10)))
    for name, _, spec in CASES:
        claim.better(f"{name} {spec}", "awq", "nearest")
    case = f"smollm2_135m {NARROW}"
    claim.better(case, "clipped", "clipped by squares")
    claim.better(case, "awq, clipped", "clipped")
    gains = zip(claim.values[case, "awq"], claim.values[case, "nearest"], strict=True)
    claim.vanishes("flat channels", "awq", "nearest", within=0.1 * median(a - b for a, b in gains))
    claim.show()


if __name__ == "__main__":
    main()
