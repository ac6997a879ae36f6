"""Is the chosen allocation truly better than uniform bits and than one that sees no terms between sites?

    python benchmarks/allocation/real_models.py --assets DIR --models mobilenet_v2,efficientnet_lite0
        [--cache DIR] [--samples N] [--seconds N] [--public N]

For each uniform format of the list, the same bits are spent by: the format for all sites; the optimum of the single
losses (diagonal); the optimum with the terms between sites; and that after running the best answers whole (what
`allocate` does). All are rounded to nearest, and judged by the true loss on the public split. Prints one JSON object a
row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.true_loss import TrueLoss
from qcompiler.passes.plan.candidates import Menu, menu, target_for
from qcompiler.passes.plan.decide import contenders, judge, reranked, runs, solved
from qcompiler.passes.plan.losses import measured_losses
from qcompiler.plan import SitePlan
from qcompiler.progress import Terminal
from qcompiler.solvers.problem import Problem

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets import feeds

BITS = (2, 3, 4, 5, 6, 8)
UNIFORM = ("int3-sym-channel-fp16", "int3-sym-g32-fp16", "int4-sym-channel-fp16", "int4-sym-g32-fp16")


def with_uniform(menus: list[Menu], text: str) -> tuple[list[Menu], list[int]]:
    """The menus with a format added where it is missing, and its position in each."""
    plan = SitePlan(parse_spec(text))
    made = [m if plan in m.plans else replace(m, plans=(*m.plans, plan)) for m in menus]
    return made, [m.plans.index(plan) for m in made]


def run(name: str, args: argparse.Namespace) -> None:
    """Print the rows of one model."""
    assets, cache, formats = args.assets, args.cache, args.formats.split(",")
    model = load_onnx(assets / "models" / f"{name}.onnx")
    calibration, public = feeds(assets, name, "calib"), feeds(assets, name, "public")
    if calibration is None or public is None:
        raise SystemExit(f"there is no data for {name}")
    model.calibration = Calibration.from_arrays(calibration, model.ir)
    model.cache = None if cache is None else Cache(cache)
    backend = target_for("onnx", "float")
    menus = [m for site in find_sites(model.ir) if (m := menu(backend, site, BITS, (), "float")).plans]
    for text in formats:
        menus, _ = with_uniform(menus, text)
    clock = time.process_time()
    losses = measured_losses(model, menus, "gram", args.samples, args.seconds, Terminal())
    measuring = time.process_time() - clock
    sites, plans = [m.site for m in menus], [list(m.plans) for m in menus]
    rest = Calibration.from_arrays(public, model.ir)
    public_loss = TrueLoss(model, sites, plans, samples=min(rest.count, args.public), data=rest, memory=2 << 30)
    own = judge(model, menus, losses.facts["samples"])
    for text in formats:
        row = compared(menus, text, losses, own, public_loss)
        row |= {"mode": losses.facts["mode"], "cpu_s_measuring": round(measuring, 1)}
        print(json.dumps({"model": name, **row}), flush=True)


def compared(
    menus: list[Menu], text: str, losses: Any, own: tuple[TrueLoss, float], public: TrueLoss
) -> dict[str, Any]:
    """One row: what each allocation of the uniform format's bits truly loses."""
    uniform = np.array(with_uniform(menus, text)[1], np.intp)
    bits = [[float(b) for b in m.bits()] for m in menus]
    weights = sum(m.site.count for m in menus)
    room = sum(row[o] for row, o in zip(bits, uniform, strict=True))
    alone = Problem.ragged(losses.rows, {"bits": bits}, {"bits": room})
    problem = replace(alone, cross=losses.cross)
    clock = time.monotonic()
    solution, diagonal = solved(problem, "auto"), solved(alone, "ilp")
    seconds = time.monotonic() - clock
    final, facts = diagonal, {"taken": None}
    if (most := runs(8, weights)) > 1:  # larger models are not run whole, and then terms between sites not believed
        final, facts = reranked(*own, contenders(problem, solution, most))
    chosen = {"uniform": uniform, "diagonal": diagonal.choice, "gram": solution.choice, "default": final.choice}
    true = public.losses(list(chosen.values()))
    found: dict[str, Any] = {"format": text, "bits": round(room / weights, 4)}
    found |= {name: float(f"{value:.5g}") for name, value in zip(chosen, true, strict=True)}
    against = {name: public.difference(chosen[name], final.choice) for name in ("uniform", "diagonal")}
    found |= {f"better than {name} by, noise": [float(f"{v:.3g}") for v in pair] for name, pair in against.items()}
    found |= {
        "over uniform": round(found["default"] / found["uniform"], 3),
        "gap": solution.gap,
        "taken": facts["taken"],
    }
    return {**found, "method": solution.method, "solver_s": round(seconds, 1), "public_samples": public.used}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="true losses of allocations on real models")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--models", default="mobilenet_v2,efficientnet_lite0,minilm_l6_v2")
    parser.add_argument("--formats", default=",".join(UNIFORM))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--samples", type=int, default=0, help="to measure with; 0: as many as are enough")
    parser.add_argument("--seconds", type=float, default=1e9, help="for measuring; the default measures all formats")
    parser.add_argument("--public", type=int, default=260, help="samples that judge, at most")
    args = parser.parse_args()
    for name in args.models.split(","):
        run(name, args)


if __name__ == "__main__":
    main()
