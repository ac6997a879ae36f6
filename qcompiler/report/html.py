"""The report as one HTML page that needs nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from qcompiler.report import allocation_plots, plots

_LATER: dict[str, Any] = {"decision": None, "latencies": [], "gains": []}


def render(data: Mapping[str, Any]) -> str:
    """The page for the data that `report.json.collect` puts together; that of earlier versions may lack `_LATER`."""
    from markupsafe import Markup

    plain = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    data = {**_LATER, **data}
    layers = data["layers"]
    comparable = not (data["decision"] or {}).get("units")  # or predictions say nothing about single losses
    charts = {
        "bits": plots.bits_per_layer(layers),
        "sensitivity": allocation_plots.sensitivity(data["sensitivity"]),
        "scatter": plots.predicted_realised(layers if comparable else [], _judged_by(data["figures"]["held_back"])),
        "curve": plots.size_curve(data["curve"]),
        "parts": plots.byte_parts(data["parts"]),
        "treemap": plots.byte_treemap(layers),
        "ranges": plots.activation_ranges(data["ranges"]),
    }
    times = [(entry, Markup(allocation_plots.latency_bars(entry))) for entry in data["latencies"]]
    pictures = {name: Markup(svg) for name, svg in charts.items()}
    return _filled("page.jinja", **data, charts=pictures, times=times, plain=Markup(plain))


def render_path(name: str, target: str, points: Sequence[Mapping[str, Any]]) -> str:
    """A page with the size-against-loss path: `points` as `plan.solution["pareto"]` holds them."""
    from markupsafe import Markup

    chart = plots.size_curve({
        "points": [(p["bits"], p["loss"]) for p in points],
        "bounds": [(p["bits"], p["bound"]) for p in points if p["bound"] is not None],
        "chosen": (0.0, 0.0),
    })  # fmt: skip
    return _filled("pareto.jinja", name=name, target=target, points=points, chart=Markup(chart))


def _filled(template: str, **values: Any) -> str:
    """A template of this folder with values, and the style that all pages share."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=plots.size, brief=brief, percent=percent, color=plots.bits_color)
    environment.filters.update(ms=milliseconds, change=change)
    folder = resources.files(__package__ or "")
    page = environment.from_string((folder / template).read_text("utf-8"))
    return page.render(**values, style=Markup((folder / "style.css").read_text("utf-8")))


def _judged_by(held_back: int) -> str:
    return "held-back data" if held_back else "calibration data"


def brief(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def change(nats: float) -> str:
    """A change of a loss's logarithm, with its sign: 0.1 is a loss lower by 10 %."""
    return f"{nats:+.3f}"


def milliseconds(seconds: float) -> str:
    """A time in ms, with four digits."""
    return f"{seconds * 1e3:.4g}\N{NO-BREAK SPACE}ms"
