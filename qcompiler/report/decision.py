"""How an allocation was decided, as plain data: where the losses came from, what was run whole, what was timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.pipeline import PassReport

_BLIND = ("ilp", "lagrangian")  # solvers that see no terms between layers
_SOURCES = {
    "gram": "each format at each layer alone, by the change of the model's output",
    "ablation": "each format at each layer alone, by the change of the model's output",
    "pairwise": "each format at each layer, alone and in pairs, by the change of the model's output (CLADO)",
    "fisher": "the Fisher information of each layer",
    "hutchinson": "Hessian traces of each layer (HAWQ)",
    "hessian": "the Hessian proxy of each layer, without the model's loss (BAQ)",
    "masked": "disturbed weights of each layer (OHQ)",
    "masked-output": "disturbed outputs of each layer (OHQ)",
}
_MODES = {
    "tail": "formats above 5 bits were mostly told from narrower ones",
    "anchor": "one format a layer was measured, the others were told from it",
}


def decision(reports: Sequence[PassReport], solution: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the section "How the decision was made" shows; None for a plan that no solver made.

    Args:
        reports: of all passes; those of passes that measured nothing add nothing.
        solution: of the plan.
    """
    if not solution.get("method"):
        return None
    measured, runs = _metric(reports, "measured"), _runs(_metric(reports, "runs"))
    methods = [row["method"] for row in runs["rows"]] if runs else [solution["method"]]
    blind = [method in _BLIND for method in methods]
    terms = "not counted" if all(blind) else "counted, but for the first allocation below" if blind[0] else "counted"
    return {
        "losses": _losses(measured),
        "terms": terms if measured.get("cross terms") else None,
        "plain": bool(measured.get("cross terms")) and solution["method"] in _BLIND,
        "method": solution["method"],
        "status": solution.get("status"),
        "seconds": solution.get("seconds"),
        "predicted": solution.get("predicted_loss"),
        "units": solution.get("loss_units"),
        "bound": solution.get("lower_bound"),
        "gap": solution.get("gap"),
        "bops": _metric(reports, "latency").get("bops"),
        "runs": runs,
    }


def latencies(reports: Sequence[PassReport]) -> list[dict[str, Any]]:
    """One entry for each budget in seconds, as the section "Time on this machine" shows them; all times in seconds.

    Entries: samples (of a run), budget, fastest (measured), fixed (what no format changes), tries, taken (index of a
    try), measured, by_bops (measured, of the allocation by bit operations at equal predicted loss), same_as_by_bops,
    faster_than_by_bops, loss, loss_by_bops.
    """
    found = _metric(reports, "latency")
    return [
        {"samples": int(resource.partition("@")[2] or 1), **facts}
        for resource, facts in found.items()
        if isinstance(facts, Mapping) and facts.get("tries") and "measured" in facts
    ]


def _metric(reports: Sequence[PassReport], name: str) -> Mapping[str, Any]:
    """A table of the last pass that has it."""
    return next((report.metrics[name] for report in reversed(reports) if report.metrics.get(name)), {})


def _losses(measured: Mapping[str, Any]) -> dict[str, Any] | None:
    if not measured:
        return None
    method = str(measured.get("method", ""))
    told = _MODES.get(str(measured.get("mode")))
    counts = {name: measured.get(name) for name in ("samples", "probes", "seconds")}
    return {"method": method, "source": _SOURCES.get(method, method), "told": told, **counts}


def _runs(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The allocations that were run whole, first the one that another must clearly beat."""
    if not found:
        return None
    count, taken = len(found["true"]), found["taken"]
    columns = {
        "method": found.get("methods", ["?"] * count),
        "predicted": found["predicted"],
        "true": found["true"],
        "gain": found.get("gains", [found["gain"] if i == taken else None for i in range(count)]),
        "error": found.get("errors", [found["noise"] if i == taken else None for i in range(count)]),
    }
    rows = [dict(zip(columns, map(_finite, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"rows": rows, "taken": taken, "margin": found.get("margin"), "samples": found.get("samples")}


def _finite(value: Any) -> Any:
    """None for what JSON cannot say."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
