"""The charts of what an allocation was decided on: losses with their errors, and times on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.report.plots import bits_color
from qcompiler.report.svg import Drawing, decades, linear, logarithmic, round_ticks

_LEAST = 1e-8  # of the largest loss: what is below lies on the floor of the chart


def sensitivity(found: Mapping[str, Any] | None) -> str:
    """Loss with one layer alone quantized: a stroke a width, in a pale box of one standard error to either side."""
    if not found or not found["layers"]:
        return ""
    values = [v for row in found["loss"] for v in row if v is not None and v > 0]
    if not values:
        return ""
    d = Drawing(height=330, left=64)
    low, high = max(min(values), max(values) * _LEAST) / 1.5, max(values) * 1.5
    y, step = logarithmic(low, high, d.y0, d.y1), (d.x1 - d.x0) / len(found["layers"])
    ticks = decades(low, high)
    d.y_axis(ticks if len(ticks) > 1 else [low * 1.5, high / 1.5], y, "loss of the model")
    rings: list[tuple[float, float, str, str]] = []
    for column, name in enumerate(found["layers"]):
        middle = d.x0 + (column + 0.5) * step
        errors = found["noise"][column] if "noise" in found else [None] * len(found["widths"])
        for index, (loss, error) in enumerate(zip(found["loss"][column], errors, strict=True)):
            if loss is None:
                continue
            color, at = bits_color(found["widths"][index]), y(loss)
            tip = f"{name}\n{found['widths'][index]} bits: loss {loss:.3g}" + (f" ± {error:.1g}" if error else "")
            wide = min(0.8 * step, 44.0)
            if error:
                top = y(min(loss + error, high))
                box = f"fill:{color};fill-opacity:.35"
                d.rect(middle - wide / 2, top, wide, y(max(loss - error, low)) - top, box, tip)
            d.rect(middle - wide / 2, at - 0.6, wide, 1.2, f"fill:{color}", tip)
            if found["chosen"][column] == index:
                rings.append((middle, at, color, tip))
    radius = min(max(0.3 * step, 2.2), 5.0)
    for x, at, color, tip in rings:
        d.dot(x, at, radius, f"fill:{color};stroke:var(--ink);stroke-width:1.2", tip)
    note = "layers in graph order; stroke: loss; pale box: one standard error to either side; ringed: chosen"
    d.text((d.x0 + d.x1) / 2, d.height - 8, note, css="axis")
    return d.render("Sensitivity of each layer at each width, with standard errors")


def latency_bars(found: Mapping[str, Any]) -> str:
    """Bars of milliseconds: what the parts add up to, what was measured, and the budget as a line."""
    tried = found["tries"][found.get("taken", 0)]
    fixed = tried.get("fixed", found["fixed"])
    rows: list[tuple[str, list[tuple[float, str, str]]]] = [
        (
            "sum of parts",
            [
                (fixed, "var(--float)", "what no format changes"),
                (tried["predicted"] - fixed, "var(--accent)", "kernels of the chosen formats, each timed alone"),
            ],
        ),
        ("chosen, measured", [(found["measured"], "var(--accent)", "the whole artifact")]),
        ("by bit operations, measured", [(found["by_bops"], "var(--p1)", "fewest bit operations at equal loss")]),
        ("fastest formats, measured", [(found["fastest"], "var(--p2)", "the least that any formats take")]),
    ]
    d = Drawing(width=720, height=58 + 30 * len(rows), left=194, right=76, top=20)
    most = max([found["budget"], *(sum(part[0] for part in parts) for _, parts in rows)])
    # A budget far beyond all that was timed would leave no room for the bars.
    high = min(most, 1.6 * max(sum(part[0] for part in parts) for _, parts in rows))
    x = linear(0, high * 1e3, d.x0, d.x1)
    d.x_axis(round_ticks(0, high * 1e3), x, "milliseconds")
    for number, (label, parts) in enumerate(rows):
        top, start = d.y1 + 6 + 30 * number, 0.0
        d.text(d.x0 - 10, top + 14, label, "end", css="legend")
        for seconds, color, what in parts:
            left, right = x(start * 1e3), x((start + seconds) * 1e3)
            d.rect(left, top, right - left, 19, f"fill:{color}", f"{what}: {seconds * 1e3:.3g} ms", radius=2)
            start += seconds
        d.text(d.width, top + 14, f"{start * 1e3:.4g} ms", "end", css="legend")
    if found["budget"] <= high:
        at = x(found["budget"] * 1e3)
        d.line(at, d.y1 - 2, at, d.y0, "limit")
        anchor = "end" if at > d.x1 - 60 else "middle"
        d.text(at, d.y1 - 7, f"budget {found['budget'] * 1e3:.4g} ms", anchor, css="callout")
    return d.render("Time of a run against the budget")
