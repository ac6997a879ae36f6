"""D2Quant (2602.02546): a second scale for the columns of down projections, absorbed by the rows before them.

Claim, before the run: with only the down projections of the first blocks of smollm2_135m rounded to 2 and 3 bits in
groups of 64, dual scales are better than single ones at equal bytes; so they are with all layers rounded (sites =
"all"). Control: down projections of Gaussian numbers whose inputs all have one magnitude, where no column is
different: at most a tenth of the gain is left (measured: .06 and .08 dB, so not quite nothing).

Claim, before the run: the mean correction behind norms ("DAC"), on top of dual scales in all layers, is better than
none at 2 and 3 bits; what it stores (4 bytes a channel of a norm) is counted. Control: behind products that have got
their means back already there is nothing left for it: at most a quarter of the gain, or .05 dB.

    python benchmarks/accuracy/d2quant.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
from awq import flatten
from harness import SEEDS, Claim, Fixture, Measured, assets_folder, fixture, measure

from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.dual_scale import DualScale
from qcompiler.pipeline import Pass

WEIGHED = Nearest(importance="activations")
MEANS: dict[str, tuple[Pass, ...]] = {
    "dual": (),
    "dual, means": (BiasCorrection(places="norms", create=True),),
    "products": (BiasCorrection(create=True),),
    "products, means": (BiasCorrection(places="all", create=True),),
}
OTHERS = ("embeddings", "*self_attn*", "*gate_proj*", "*up_proj*")


def gaussian(model: Model) -> None:
    """Flat inputs, and down projections without any structure."""
    flatten(model)
    rng = np.random.default_rng(0)
    for site in find_sites(model.ir):
        if "down_proj" in site.name:
            matrix = rng.normal(size=(site.rows, site.columns)) * site.matrix().std()
            site.weight.const_value = ir.tensor(site.from_matrix(matrix).astype(np.float32), name=site.weight.name)


def rounded(model: Fixture, spec: str, keep: tuple[str, ...], *transforms: Pass) -> Measured:
    return measure(model, [Uniform(spec, keep=keep), *transforms, WEIGHED])


def means(assets: Path, specs: Sequence[str]) -> None:
    claim = Claim("D2Quant: means behind norms are worth giving back")
    for seed in SEEDS:
        model = fixture(assets, "smollm2_135m", 2, seed=seed, samples=8, public=4)
        for spec in specs:
            before = (Uniform(spec, keep=("embeddings",)), DualScale(sites="all"), WEIGHED)
            for arm, passes in MEANS.items():
                found = measure(model, [*before, *passes])
                new = sum(report.metrics.get("new_bytes", 0) for report in found.reports)
                claim.record(spec, arm, replace(found, bytes=found.bytes + new))
    for spec in specs:
        claim.better(spec, "dual, means", "dual")
        gains = zip(claim.values[spec, "dual, means"], claim.values[spec, "dual"], strict=True)
        claim.vanishes(spec, "products, means", "products", max(0.25 * median(a - b for a, b in gains), 0.05))
    claim.show()


def main() -> None:
    claim = Claim("D2Quant: dual scales are better than single ones, at equal bytes")
    assets = assets_folder()
    specs = ("uint2-asym-g64", "int3-sym-g64")
    means(assets, specs)
    for seed in SEEDS:
        plain = fixture(assets, "smollm2_135m", 2, seed=seed, samples=8, public=4)
        control = plain.changed(gaussian)
        for spec in specs:
            for case, model, keep, item in (
                (f"down {spec}", plain, OTHERS, DualScale()),
                (f"all {spec}", plain, ("embeddings",), DualScale(sites="all")),
                (f"gaussian {spec}", control, OTHERS, DualScale()),
            ):
                claim.record(case, "single", rounded(model, spec, keep))
                claim.record(case, "dual", rounded(model, spec, keep, item))
    for spec in specs:
        claim.better(f"down {spec}", "dual", "single")
        claim.better(f"all {spec}", "dual", "single")
        gains = zip(claim.values[f"down {spec}", "dual"], claim.values[f"down {spec}", "single"], strict=True)
        claim.vanishes(f"gaussian {spec}", "dual", "single", within=max(0.1 * median(a - b for a, b in gains), 0.02))
    claim.show()


if __name__ == "__main__":
    main()
