"""The plain data of a report: everything that the page shows, as JSON-able values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.budget import Row, breakdown
from qcompiler.evaluate.classes import class_output
from qcompiler.formats import QuantSpec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.pipeline import PassReport
from qcompiler.plan import SitePlan
from qcompiler.report.decision import decision, latencies
from qcompiler.report.gains import gains


def collect(
    model: Model,
    reports: Sequence[PassReport],
    manifest: Mapping[str, Any],
    realised: Mapping[str, float],
    seen: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Put together what `report.html.render` shows.

    Args:
        model: rounded, its graph still float, with its plan.
        reports: of all passes.
        manifest: entries of the artifact's manifest.
        realised: site name -> loss with its final codes alone.
        seen: value name -> smallest and largest number in calibration, for values with a static range.
    """
    table = {row["site"]: row for report in reports for row in report.metrics.get("sites", []) if "options" in row}
    rows = {row.site: row for row in breakdown(model)}
    sites = find_sites(model.ir)
    layers = [_layer(s, model.plan.sites.get(s.name), rows[s.name], table.get(s.name), realised) for s in sites]
    return {
        "name": manifest["name"],
        "target": manifest["target"],
        "budget": manifest["budget"],
        "qcompiler": manifest["qcompiler"],
        "figures": _figures(manifest),
        "layers": layers,
        "sensitivity": _sensitivity([table[s.name] for s in sites if s.name in table]),
        "parts": _parts(sites, model, rows),
        "ranges": _ranges(model, seen),
        "curve": _curve(model.plan.solution),
        "decision": decision(reports, model.plan.solution),
        "latencies": latencies(reports),
        "gains": gains(reports),
        "passes": [_pass(report) for report in reports],
        "tolerance": manifest["tolerance"],
        "verification": manifest["verification"],
        "pipeline": manifest["pipeline"],
    }


def _figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bits_per_weight", "stored_bytes", "fp32_bytes", "realised_loss", "predicted_loss", "lower_bound", "gap")
    chosen = {name: manifest[name] for name in (*names, "seconds", "peak_rss_bytes")}
    held = manifest["calibration"]["held_back"]
    kinds = manifest["output_kinds"]
    judged = class_output(kinds) if len(kinds) > 1 else None
    uncounted = sum(weight["bytes"] for weight in manifest["uncounted"])
    verified = bool(manifest["verification"])
    return {
        **chosen,
        **manifest["fidelity"],
        "verified": verified,
        "held_back": held,
        "uncounted_bytes": uncounted,
        "class_output": judged,
    }


def _layer(
    site: Site, plan: SitePlan | None, row: Row, measured: Mapping[str, Any] | None, realised: Mapping[str, float]
) -> dict[str, Any]:
    spec = plan.weight if plan else None
    return {
        "name": site.name,
        "op": site.op,
        "shape": list(site.shape),
        "count": site.count,
        "bits": None if spec is None else spec.bits,
        "format": "float (kept)" if row.what == "kept" else row.spec,
        "stored_bits": row.bits / site.count,
        "bytes": row.bytes,
        "activation": plan.activation_text if plan else "float",
        "predicted": measured["loss"] if measured else None,
        "realised": realised.get(site.name),
    }


def _sensitivity(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss and its standard error [layer][width], of the best option of each width."""
    widths = sorted({option["width"] for row in rows for option in row["options"]})
    if not widths:
        return None
    best = [[_best([o for o in row["options"] if o["width"] == w]) for w in widths] for row in rows]
    return {
        "layers": [row["site"] for row in rows],
        "widths": widths,
        "loss": [[option.get("loss") for option in row] for row in best],
        "noise": [[option.get("noise") for option in row] for row in best],
        "chosen": [widths.index(row["width"]) for row in rows],
    }


def _best(options: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The option that loses least; nothing where there is none."""
    return min((o for o in options if o["loss"] is not None), key=lambda o: o["loss"], default={})


def _parts(sites: Sequence[Site], model: Model, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Stored bytes by kind."""
    bits = {"codes": 0, "scales": 0, "zero points": 0, "float weights": 0}
    for site in sites:
        plan = model.plan.sites.get(site.name)
        if plan is None or plan.weight is None or rows[site.name].what == "kept":
            bits["float weights"] += rows[site.name].bits
            continue
        codes, scales, zeros = _split_bits(plan.weight, site.rows, site.columns)
        bits["codes"] += codes
        bits["scales"] += scales
        bits["zero points"] += zeros
    parts = [{"name": name, "bytes": -(-count // 8)} for name, count in bits.items()]
    others = sum(row.bytes for row in rows.values() if row.what == "other")
    return [*parts, {"name": "other constants", "bytes": others}]


def _split_bits(spec: QuantSpec, rows: int, columns: int) -> tuple[int, int, int]:
    scales = spec.scale_bits(rows, columns)
    codes, _ = spec.format.storage(rows, columns, spec.granularity, spec.symmetric)
    return codes, scales, spec.stored_bits(rows, columns) - codes - scales


def _ranges(model: Model, seen: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """What calibration saw and the 8-bit range that was chosen, value by value."""
    return [
        {"value": name, "before": seen.get(name), "after": [fixed.low, fixed.high]}
        for name, fixed in model.ranges.items()
    ]


def _curve(solution: Mapping[str, Any]) -> dict[str, Any] | None:
    """The path that was solved for, with its bounds, if there is one; else the one that costs nothing."""
    solved = solution.get("pareto")
    if not solved and not solution.get("curve"):
        return None
    chosen, bound = solution.get("chosen", [None, None]), solution.get("lower_bound")
    if not solved:
        return {"points": solution["curve"], "bounds": [], "chosen": chosen, "lower_bound": bound}
    return {
        "points": [[p["bits"], p["loss"]] for p in solved],
        "bounds": [[p["bits"], p["bound"]] for p in solved if p["bound"] is not None],
        "chosen": chosen,
        "lower_bound": bound,
    }


def _pass(report: PassReport) -> dict[str, Any]:
    """A pass with its plain facts; tables have their own place on the page."""
    facts = {k: _fact(v) for k, v in report.metrics.items() if isinstance(v, int | float | str | bool)}
    refused = [{"where": r.where, "reason": r.reason} for r in report.refused]
    return {
        "name": report.name,
        "changed": report.changed,
        "seconds": report.seconds,
        "refused": refused,
        "metrics": facts,
    }


def _fact(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
