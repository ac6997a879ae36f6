"""MobileQuant's acceptance test (systems.md, row 6), W8A8 and W4A8 with static activations, one grid a tensor.

Claim: scales, clipping and ranges learned end to end are better than SmoothQuant with min-max ranges, and that is
better than min-max alone, at equal stored bytes. The cause is outlier channels. Control: the same graph with its
residual stream turned by a random Hadamard matrix (the same function), which shares the outliers out; what learning
gains over min-max there must be small.

    nice -n 5 python benchmarks/accuracy/mobilequant.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from collections.abc import Sequence

from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.mobilequant import MobileQuant
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.pipeline import Pass
from qcompiler.progress import Silent

FORMATS = {"W8A8": "int8-sym-channel-fp32", "W4A8": "int4-sym-channel-fp32"}
CASES = (("smollm2_135m", 1), ("minilm_l6_v2", None))
CONTROL = 1.0  # dB


def arms(spec: str) -> dict[str, Sequence[Pass]]:
    """The pipelines that are compared; tables of embeddings stay float."""
    plan = Uniform(spec, "static", embeddings="float")
    after = [Nearest(), ActivationRanges("minmax")]
    smooth = Smooth(sites="all")
    return {
        "min-max": [plan, *after],
        "SmoothQuant": [smooth, plan, *after],
        "learned": [smooth, plan, MobileQuant(epochs=4, squared=True, codes=True)],
    }


def run(claim: Claim, case: str, model: Fixture, spec: str) -> None:
    """All arms for one seed."""
    for arm, passes in arms(spec).items():
        claim.record(case, arm, measure(model, passes))


def without_outliers(model: Model) -> None:
    """Share the outliers of the residual stream out among all channels."""
    assert Rotate().run(model, Silent()).changed


def main() -> None:
    """Measure all cases, then say what holds."""
    assets = assets_folder()
    claim = Claim("MobileQuant: learned end to end > SmoothQuant > min-max, static activations")
    for name, blocks in CASES:
        for seed in SEEDS:
            model = fixture(assets, name, blocks, seed=seed)
            for form, spec in FORMATS.items():
                run(claim, f"{name} {form}", model, spec)
                if blocks is not None and form == "W8A8":
                    run(claim, f"{name} {form}, rotated", model.changed(without_outliers), spec)
    for name, blocks in CASES:
        for form in FORMATS:
            claim.better(f"{name} {form}", "learned", "SmoothQuant")
            claim.better(f"{name} {form}", "SmoothQuant", "min-max")
            claim.better(f"{name} {form}", "learned", "min-max")
        if blocks is not None:
            claim.vanishes(f"{name} W8A8, rotated", "learned", "min-max", CONTROL)
    claim.show()


if __name__ == "__main__":
    main()
