"""What each step gained, as plain data: the trials of passes that choose, and what was learned end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from qcompiler.pipeline import PassReport

_TITLES = {"choose-transforms": "Transforms", "choose-rounding": "Rounding"}


def gains(reports: Sequence[PassReport]) -> list[dict[str, Any]]:
    """One entry a pass that measured what it does on held-back samples, in the order of the passes.

    Returns:
        Entries: pass, title, chosen (the row that decided), rows (steps, loss, share of the loss of the first row,
        seconds, refused, kept), refitted (what is kept was made once more with all samples) and interactions (see
        `passes.search.trials.interactions`; empty where no two steps were tried together).
    """
    found: list[dict[str, Any]] = []
    for report in reports:
        if report.metrics.get("trials"):
            found.append(_trials(report))
        elif "held_back_loss_before" in report.metrics:
            found.append(_before_and_after(report))
    return found


def _trials(report: PassReport) -> dict[str, Any]:
    trials, chosen = report.metrics["trials"], str(report.metrics.get("chosen", ""))
    rows = [_row(" + ".join(t["steps"]) or "none", t["loss"], t["seconds"], t["refused"]) for t in trials]
    decided = str(report.metrics.get("decided_by", chosen))
    return _entry(report, decided, rows, report.metrics.get("interactions", []))


def _before_and_after(report: PassReport) -> dict[str, Any]:
    before, after = (report.metrics[f"held_back_loss_{when}"] for when in ("before", "after"))
    rows = [_row("without", before, 0.0, ""), _row(report.name, after, report.seconds, "")]
    return _entry(report, report.name if report.metrics.get("kept") else "without", rows, [])


def _row(steps: str, loss: float | None, seconds: float, refused: str) -> dict[str, Any]:
    known = loss if loss is not None and isfinite(loss) else None
    return {"steps": steps, "loss": known, "seconds": seconds, "refused": refused}


def _entry(
    report: PassReport, chosen: str, rows: list[dict[str, Any]], interactions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    first = rows[0]["loss"]
    for row in rows:
        row["share"] = row["loss"] / first if first and row["loss"] is not None else None
        row["kept"] = row["steps"] == chosen
    title = _TITLES.get(report.name, report.name.capitalize())
    facts = {"rows": rows, "interactions": list(interactions), "refitted": bool(report.metrics.get("refitted"))}
    return {"pass": report.name, "title": title, "chosen": chosen} | facts
