"""SLiM's saliency (systems.md row 5): the order of errors, layer by layer, in the norm of the layer's output.

    nice -n 5 python benchmarks/accuracy/slim.py --assets ~/.cache/qc-assets

Claim, written before the run: with 4-bit weights in groups of 64 and a branch of rank 8 a layer, on inputs that
calibration never saw, E||x (W' - W)^T||^2 of the branch by SLiM's saliency is less than that of the plain branch, and
that less than without a branch, in at least 90 % of the layers. (The paper's masks of 2:4 are left out: there is no
sparse format.) Control: with Gaussian weights and gains of one the saliency lowers the error by at most 10 % in the
median layer.
"""

from __future__ import annotations

from statistics import median

import numpy as np
from harness import SEEDS, Claim, Fixture, assets_folder, fixture
from svdquant import KEPT, MODELS, gaussian

from qcompiler.calibration import Calibration
from qcompiler.graph.sites import find_sites
from qcompiler.measure.gram import grams
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.lorc import LoRC
from qcompiler.pipeline import Pass, Pipeline

SPEC = "int4-sym-g64-fp16"
RANK = 8


def errors(found: Fixture, passes: list[Pass]) -> dict[str, float]:
    """By layer the squared error that its rounded weight makes in its output, on public inputs of the float model."""
    judged = found.model.clone()
    data = {name: np.concatenate([batch[name] for batch in found.public]) for name in found.public[0]}
    judged.calibration = Calibration.from_arrays(data, judged.ir)
    model = found.model.clone()
    Pipeline([Uniform(SPEC, keep=KEPT), *passes], verify=False).run(model)
    sites = [site for site in find_sites(model.ir) if site.name in model.weights and site.op != "Gather"]
    known = grams(judged, [site for site in find_sites(judged.ir) if site.name in model.weights])
    # What the branch takes over is not in the weight any more, so that this is the error with it.
    return {s.name: known[s.name].error(model.weights[s.name].decode() - s.matrix()) for s in sites if s.name in known}


def run(claim: Claim, case: str, found: Fixture) -> None:
    """The share of layers in order, and what each step of the order gains in the median layer."""
    branch = {name: LoRC(name, rank=RANK, share=2.0, common=False) for name in ("plain", "slim")}
    none = errors(found, [Nearest()])
    plain, slim = (errors(found, [branch[name], Nearest()]) for name in branch)
    claim.record(case, "slim < plain < none", float(np.mean([slim[n] < plain[n] < none[n] for n in none])))
    claim.record(case, "asked", 0.9)
    claim.record(case, "plain over slim, median layer", median(plain[n] / slim[n] for n in none))
    claim.record(case, "none over plain, median layer", median(none[n] / plain[n] for n in none))
    claim.record(case, "one", 1.0)


def main() -> None:
    """Measure, print the table and the verdicts."""
    assets = assets_folder()
    for name, blocks in MODELS:
        claim = Claim(f"Order of saliences of low-rank branches (SLiM, 2410.09615), {name}", "(ratio)")
        for seed in SEEDS:
            found = fixture(assets, name, blocks, seed=seed)
            run(claim, name, found)
            run(claim, f"gaussian {name}", found.changed(gaussian))
        claim.better(name, "slim < plain < none", "asked", -1e-9)
        claim.vanishes(f"gaussian {name}", "plain over slim, median layer", "one", 0.1)
        claim.show()


if __name__ == "__main__":
    main()
