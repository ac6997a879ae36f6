"""The report as one HTML page that needs nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from qcompiler.report import plots


def render(data: Mapping[str, Any]) -> str:
    """The page for the data that `report.json.collect` puts together."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=plots.size, brief=brief, percent=percent, color=plots.bits_color)
    template = environment.from_string((resources.files(__package__ or "") / "page.jinja").read_text("utf-8"))
    layers = data["layers"]
    charts = {
        "bits": plots.bits_per_layer(layers),
        "heatmap": plots.sensitivity_heatmap(data["sensitivity"]),
        "scatter": plots.predicted_realised(layers, _judged_by(data["figures"]["held_back"])),
        "curve": plots.size_curve(data["curve"]),
        "parts": plots.byte_parts(data["parts"]),
        "treemap": plots.byte_treemap(layers),
        "ranges": plots.activation_ranges(data["ranges"]),
    }
    plain = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return template.render(**data, charts={name: Markup(svg) for name, svg in charts.items()}, plain=Markup(plain))


def _judged_by(held_back: int) -> str:
    return "held-back data" if held_back else "calibration data"


def brief(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"
