"""SmoothQuant+ (2312.03788): one searched strength for the whole model, weights only.

Claim, before the run: on the first blocks of smollm2_135m with int4 in groups of 64 the searched strength is better
than rounding to nearest at equal bytes, and not worse than strength 0. Control: on a model that was smoothed with that
strength before, searching again gains less than a tenth.
"""

from __future__ import annotations

from statistics import median

from harness import SEEDS, Claim, Fixture, Measured, assets_folder, fixture, measure

from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.passes.transform.smooth_plus import SmoothPlus
from qcompiler.pipeline import Pass, Pipeline

SPEC = "int4-sym-g64"
SEARCH = SmoothPlus(loss="squared", samples=2)


def rounded(model: Fixture, *transforms: Pass) -> Measured:
    return measure(model, [Uniform(SPEC, embeddings="float"), *transforms, Nearest()])


def main() -> None:
    claim = Claim("SmoothQuant+: a searched strength is better than nearest and than strength 0, at equal bytes")
    assets = assets_folder()
    for seed in SEEDS:
        plain = fixture(assets, "smollm2_135m", 2, seed=seed, samples=8, public=4)
        claim.record(SPEC, "nearest", rounded(plain))
        claim.record(SPEC, "strength 0", rounded(plain, Smooth(0.0)))
        found = rounded(plain, SEARCH)
        claim.record(SPEC, "searched", found)
        strength = found.reports[1].metrics["strength"]
        print(f"    strength {strength}", flush=True)
        control = plain.changed(Pipeline([Smooth(strength)] if strength is not None else [], verify=False).run)
        claim.record("smoothed before", "nearest", rounded(control))
        claim.record("smoothed before", "searched", rounded(control, SEARCH))
    claim.better(SPEC, "searched", "nearest")
    claim.better(SPEC, "searched", "strength 0", by=-1e-6)
    gains = zip(claim.values[SPEC, "searched"], claim.values[SPEC, "nearest"], strict=True)
    claim.vanishes("smoothed before", "searched", "nearest", within=0.1 * median(a - b for a, b in gains))
    claim.show()


if __name__ == "__main__":
    main()
