"""Budgets in milliseconds on target cpu: the sum of parts against whole artifacts, and what a latency buys.

    python benchmarks/allocation/latency.py --assets ~/.cache/qc-assets [--model digits_cnn] [--budget 20ms] [--cache D]

For each model: the times of the target's own kernels, the latency that their sum predicts for three allocations
against the measured one, and for each budget the loss of the solution, its measured latency, and beside it the
allocation of fewest bit operations that predicts no more loss. Without --budget: three latencies between the fastest
and the slowest formats.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import assets

from qcompiler.budget import Budget, parse_budget
from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.errors import BudgetInfeasible
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import menu, target_for
from qcompiler.passes.plan.ledger import Ledger
from qcompiler.passes.plan.measured import Measured
from qcompiler.progress import Progress, Terminal
from qcompiler.solvers.problem import InfeasibleProblem, Problem, Solution
from qcompiler.solvers.solve import solve

BITS = (2, 3, 4, 5, 6, 8)
SHARES = (0.1, 0.4, 0.8)  # of the way from the fastest to the slowest formats


def opened(folder: Path, name: str, cache: Path | None) -> Model:
    """A model of the assets with its calibration data."""
    model = load_onnx(folder / "models" / f"{name}.onnx")
    arrays = assets.feeds(folder, name, "calib")
    assert arrays is not None
    model.calibration = Calibration.from_arrays(arrays, model.ir)
    model.cache = None if cache is None else Cache(cache)
    return model


def parts_against_whole(work: Measured, ledger: Ledger, budget: Budget) -> list[dict[str, Any]]:
    """Predicted and measured seconds of three allocations; the fixed part comes from a fourth, the fastest."""
    priced = ledger.priced[budget.resource]
    rng = np.random.default_rng(0)
    choices = {
        "slowest": np.array([int(np.argmax(row)) for row in priced.costs]),
        "widest": np.array([len(row) - 1 for row in priced.costs]),
        "random": np.array([rng.integers(len(row)) for row in priced.costs]),
    }
    measured = work.seconds(ledger, list(choices.values()), budget)
    found: list[dict[str, Any]] = []
    for (name, choice), seconds in zip(choices.items(), measured, strict=True):
        predicted = priced.fixed + sum(row[int(o)] for row, o in zip(priced.costs, choice, strict=True))
        found.append(
            {"allocation": name, "predicted": predicted, "measured": seconds, "error": predicted / seconds - 1}
        )
    return found


def run(model: Model, budgets: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Everything about one model."""
    backend = target_for("cpu", "auto")
    sites = find_sites(model.ir)
    ledger = Ledger.of(model, sites, [menu(backend, site, BITS, (), "auto") for site in sites], ())
    start = time.monotonic()
    wide = Measured(model, backend, sites, [parse_budget("1e6ms")], progress)
    ledger = wide.price(ledger, ())
    result: dict[str, Any] = {"table_seconds": time.monotonic() - start, **wide.facts["seconds"]}
    result["parts"] = parts_against_whole(wide, ledger, wide.budgets[0])
    priced = ledger.priced["seconds"]
    low, high = (priced.fixed + sum(map(end, priced.costs)) for end in (min, max))
    menus = ledger.menus
    loss = sensitivities(model, [m.site for m in menus], [list(m.plans) for m in menus], progress=progress).loss
    texts = budgets or [f"{1e3 * (low + share * (high - low)):.4g}ms" for share in SHARES]
    result["budgets"] = [latency(model, backend, ledger, loss, text, progress) for text in texts]
    return result


def latency(model: Model, backend: Any, ledger: Ledger, loss: Any, text: str, progress: Progress) -> dict[str, Any]:
    """Facts of one budget."""

    def pose(book: Ledger) -> Problem:
        return book.problem([list(map(float, row)) for row in loss], work.budgets, ())

    def answer(problem: Problem) -> Solution:
        try:
            return solve(problem)
        except InfeasibleProblem as error:
            raise BudgetInfeasible(str(error)) from error

    work = Measured(model, backend, find_sites(model.ir), [parse_budget(text)], progress)
    work.facts["seconds"] = {"tries": []}
    book, solution = work.confirm(ledger, answer(pose(ledger)), pose, answer)
    bits = book.average(book.problem([[0.0] * len(m.plans) for m in book.menus], (), ()).used(solution.choice, "bits"))
    return {"text": text, "bits_per_weight": bits, **work.facts["seconds"]}


def _verdict(row: dict[str, Any]) -> str:
    return "the same" if row["same_as_by_bops"] else "yes" if row["faster_than_by_bops"] else "no"


def shown(name: str, result: dict[str, Any]) -> str:
    """Markdown of one model."""
    ms = lambda seconds: f"{1e3 * seconds:.3f}"  # noqa: E731
    lines = [f"### {name}", "", f"Fastest artifact {ms(result['fastest'])} ms, of which {ms(result['fixed'])} ms "
             f"whatever the formats; table made in {result['table_seconds']:.0f} s.", ""]  # fmt: skip
    lines += ["| allocation | sum of parts, ms | measured, ms | error |", "|---|---|---|---|"]
    lines += [f"| {r['allocation']} | {ms(r['predicted'])} | {ms(r['measured'])} | {r['error']:+.1%} |"
              for r in result["parts"]]  # fmt: skip
    lines += [
        "",
        "| budget | measured, ms | artifacts built | predicted loss | bits | by BOPs at that loss, ms | faster |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in result["budgets"]:
        lines.append(
            f"| {row['text']} | {ms(row['measured'])} | {len(row['tries'])} | {row['loss']:.4g} | "
            f"{row['bits_per_weight']:.2f} | {ms(row['by_bops'])} | {_verdict(row)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="latency as a budget")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--model", action="append", help="digits_cnn and mobilenet_v2 if not given")
    parser.add_argument("--budget", action="append", default=[])
    parser.add_argument("--cache", type=Path, default=os.environ.get("QCOMPILER_CACHE"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.model or ["digits_cnn", "mobilenet_v2"]:
        results[name] = run(opened(args.assets, name, args.cache), args.budget, Terminal())
        print(shown(name, results[name]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
