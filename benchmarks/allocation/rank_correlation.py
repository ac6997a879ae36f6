"""Do predictions rank allocations as the truth does? Random allocations of a real model, both losses.

    python benchmarks/allocation/rank_correlation.py --assets DIR --models mobilenet_v2,efficientnet_lite0
        [--allocations 50] [--samples N] [--held-back] [--cache DIR]

The options are those of `--target onnx` with float activations; the allocations have 2.5 to 6 stored bits a weight on
average, evenly spread. "random" ones draw every site's option (and so destroy a convolution net: some layer always gets
2 bits); "sensible" ones are what an allocator would choose from losses that are wrong by random factors. Prints
Spearman's correlation of the true loss with each prediction and, to compare, with the average bits, over all
allocations and (second number) within quarters of them by bits, where bits explain little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.measure.true_loss import TrueLoss, held_back
from qcompiler.passes.plan.candidates import Menu, menu, target_for

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets import feeds

BITS = (2, 3, 4, 5, 6, 8)
Floats = npt.NDArray[np.float64]


def allocations(menus: Sequence[Menu], count: int, seed: int = 0) -> list[npt.NDArray[np.intp]]:
    """Random options, then random changes until the average of bits is what it should be."""
    rng = np.random.default_rng(seed)
    bits = [np.array(m.bits(), np.float64) for m in menus]
    total = float(sum(m.site.count for m in menus))
    found: list[npt.NDArray[np.intp]] = []
    for wanted in np.linspace(2.5, 6.0, count):
        choice = np.array([rng.integers(len(row)) for row in bits], np.intp)
        for _ in range(100_000):
            excess = sum(row[o] for row, o in zip(bits, choice, strict=True)) / total - wanted
            if abs(excess) < 0.05:
                break
            site = int(rng.integers(len(bits)))
            choice[site] = np.clip(choice[site] + (-1 if excess > 0 else 1), 0, len(bits[site]) - 1)
        found.append(choice)
    return found


def sensible(menus: Sequence[Menu], loss: Sequence[Floats], count: int, seed: int = 0) -> list[npt.NDArray[np.intp]]:
    """What an allocator would choose if every measured loss were wrong by a random factor, e^N(0, 1)."""
    rng = np.random.default_rng(seed)
    bits = [np.array(m.bits(), np.float64) for m in menus]
    total = float(sum(m.site.count for m in menus))
    found: list[npt.NDArray[np.intp]] = []
    for wanted in np.linspace(2.5, 6.0, count):
        wrong = [row * np.exp(rng.normal(0, 1, len(row))) for row in loss]
        low, high, choice = 1e-20, 1e3, list[int]()
        for _ in range(80):
            price = np.sqrt(low * high)
            choice = [int(np.argmin(row + price * b)) for row, b in zip(wrong, bits, strict=True)]
            average = sum(b[o] for b, o in zip(bits, choice, strict=True)) / total
            low, high = (price, high) if average > wanted else (low, price)
        found.append(np.array(choice, np.intp))
    return found


def correlation(predicted: Floats, true: Floats) -> tuple[float, float]:
    """Spearman over all, and the mean over four quarters (the allocations come in the order of bits)."""
    quarters = np.array_split(np.arange(len(true)), 4)
    within = [_spearman(predicted[q], true[q]) for q in quarters]
    return _spearman(predicted, true), float(np.mean(within))


def _spearman(a: Floats, b: Floats) -> float:
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def run(assets: Path, name: str, options: argparse.Namespace) -> dict[str, object]:
    """All figures of one model."""
    count, cache, samples = options.allocations, options.cache, options.samples
    model = load_onnx(assets / "models" / f"{name}.onnx")
    arrays = feeds(assets, name, "calib")
    if arrays is None:
        raise SystemExit(f"there is no calibration data for {name}")
    model.calibration = Calibration.from_arrays(arrays, model.ir)
    model.cache = None if cache is None else Cache(cache)
    backend = target_for("onnx", "float")
    menus = [m for site in find_sites(model.ir) if (m := menu(backend, site, BITS, (), "float")).plans]
    sites, plans = [m.site for m in menus], [list(m.plans) for m in menus]
    clock = time.process_time()
    measured = sensitivities(model, sites, plans, samples=samples, effort="full")
    measuring = time.process_time() - clock
    starts, gram = measured.cross()
    truth = TrueLoss(model, sites, plans, samples=samples, memory=2 << 30)
    rest = held_back(model, truth.used) if options.held_back else None
    judges = {"measured": truth}
    if rest is not None:
        judges["held back"] = TrueLoss(model, sites, plans, samples=rest.count, data=rest, memory=2 << 30)
    facts: dict[str, object] = {
        "model": name, "sites": len(sites), "options": sum(len(p) for p in plans), "samples": truth.used,
        "kinds": dict(measured.kinds), "cpu_s_measuring": round(measuring, 1),
    }  # fmt: skip
    samplers = {"random": allocations(menus, count), "sensible": sensible(menus, measured.loss, count)}
    for sampler, chosen in samplers.items():
        rows = np.array(chosen) + starts[:-1]
        bits = np.array([sum(m.bits()[o] for m, o in zip(menus, c, strict=True)) for c in chosen], np.float64)
        diagonal = 0.5 * np.diag(gram)[rows].sum(1)
        quadratic = np.array([0.5 * gram[np.ix_(row, row)].sum() for row in rows])
        for where, judge in judges.items():
            clock = time.process_time()
            true = judge.losses(chosen)
            seconds = (time.process_time() - clock) / len(chosen)
            predictions = {"bits": -bits, "diagonal": diagonal, "gram": quadratic}
            facts[f"{sampler}, {where}"] = {
                "quartiles of true loss": [float(f"{v:.3g}") for v in np.quantile(true, [0, 0.25, 0.5, 0.75, 1])],
                "median of predicted / true": {
                    "diagonal": round(float(np.median(diagonal / true)), 2),
                    "gram": round(float(np.median(quadratic / true)), 2),
                },
                "spearman": {kind: [round(v, 3) for v in correlation(p, true)] for kind, p in predictions.items()},
                "cpu_s_each": round(seconds, 2),
            }
    return facts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--models", default="mobilenet_v2,efficientnet_lite0")
    parser.add_argument("--allocations", type=int, default=50)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--held-back", action="store_true", help="also against losses on as many other samples")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    for name in arguments.models.split(","):
        print(json.dumps(run(arguments.assets, name, arguments)), flush=True)


if __name__ == "__main__":
    main()
