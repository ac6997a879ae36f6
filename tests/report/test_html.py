"""The report page: complete, offline, well-formed, and true to its data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from qcompiler.report import plots
from qcompiler.report.html import render
from qcompiler.report.svg import decades, number, round_ticks
from qcompiler.report.treemap import Box, squarify


def data(name: str = "net") -> dict[str, Any]:
    layers = [
        {
            "name": f"{name}.{i}", "op": "Conv", "shape": [8, 8], "count": 64 * (i + 1), "bits": bits, "format": "int",
            "stored_bits": (bits or 32) + 0.25, "bytes": 8 * (bits or 32) * (i + 1), "activation": "static",
            "predicted": 10.0**-i if bits else None, "realised": 10.0 ** -(i + 0.3) if bits else None,
        }
        for i, bits in enumerate([2, 4, 8, None])
    ]  # fmt: skip
    figures = {
        "bits_per_weight": 4.321, "uncounted_bytes": 0, "stored_bytes": 1000, "fp32_bytes": 8000, "sqnr_db": 12.34,
        "kl": 0.1, "class_output": "scores",
        "top1_agreement": 0.9, "verified": True, "held_back": 3, "realised_loss": 0.2, "predicted_loss": 0.3,
        "lower_bound": 0.29, "gap": 0.01, "seconds": 5.0, "peak_rss_bytes": 10**9,
    }  # fmt: skip
    return {
        "name": name, "target": "cpu", "budget": ["4.5bits"], "qcompiler": "0", "figures": figures, "layers": layers,
        "sensitivity": {"layers": ["a", "b"], "widths": [2, 4], "loss": [[0.1, 0.01], [None, 0.0]], "chosen": [1, 1]},
        "parts": [{"name": n, "bytes": b} for n, b in (("codes", 900), ("scales", 100), ("zero points", 0))],
        "ranges": [
            {"value": "v", "before": [-1.0, 3.0], "after": [-0.5, 2.0]},
            {"value": "w", "before": None, "after": [0, 1]},
        ],
        "curve": {"points": [[2.0, 1.0], [4.0, 0.1], [8.0, 0.0]], "chosen": [4.0, 0.1], "lower_bound": 0.09},
        "passes": [
            {"name": "p", "changed": 1, "seconds": 0.1, "metrics": {}, "refused": [{"where": "n", "reason": "because"}]}
        ],
        "tolerance": {"relative": 1e-3, "reason": "float sums", "noise": 4e-6},
        "verification": [
            {"inputs": "calibration", "samples": 8, "relative": 1e-6, "output": "y"}
            | {"spread": 3e-3, "allowed": 9e-3, "quantization": 0.05}
        ],
        "pipeline": "[[pass]]",
    }  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs


def test_the_page_loads_nothing_from_anywhere() -> None:
    page = render(data())
    tags = Tags()
    tags.feed(page)
    assert not [a for a in tags.attributes if a[0] in ("src", "href", "srcset", "data", "action")]
    assert not re.search(r"url\(|@import|https?://", page)


def test_every_chart_is_there_and_well_formed() -> None:
    charts = re.findall(r"<svg.*?</svg>", render(data()), re.DOTALL)
    assert len(charts) == 7
    for chart in charts:
        assert ElementTree.fromstring(chart).get("aria-label")
        assert not re.search(r'="(nan|inf|-inf)', chart)


def test_the_numbers_are_in_the_page_as_json() -> None:
    given = data()
    found = re.search(r'id="data">(.*?)</script>', render(given), re.DOTALL)
    assert found
    assert json.loads(found[1]) == given


def test_key_figures_and_refusals_are_shown() -> None:
    page = render(data())
    for text in ("4.321", "12.3", "90.0\N{NO-BREAK SPACE}%", "8.0 times smaller", "verified", "because", "float sums"):
        assert text in page


def test_hostile_names_are_escaped() -> None:
    page = render(data("</script><img src=x onerror=alert(1)>"))
    assert "<img" not in page
    assert page.count("</script>") == 2


def test_a_pipeline_without_allocation_or_ranges_has_no_such_charts() -> None:
    bare: dict[str, Any] = data() | {"sensitivity": None, "curve": None, "ranges": []}
    for layer in bare["layers"]:
        layer["predicted"] = layer["realised"] = None
    bare["figures"] |= {"gap": None, "lower_bound": None, "predicted_loss": None, "kl": None, "top1_agreement": None}
    page = render(bare)
    assert len(re.findall("<svg", page)) == 3
    for title in ("<h2>Sensitivity", "<h2>Size against", "<h2>Predicted", "<h2>Activation ranges"):
        assert title not in page


def test_a_page_of_an_earlier_version_has_no_decision_and_no_times() -> None:
    page = render(data())
    assert "How the decision was made" not in page
    assert "Time on this machine" not in page


def test_bars_have_the_height_of_their_bits() -> None:
    chart = ElementTree.fromstring(plots.bits_per_layer(data()["layers"][:3]))
    heights = [float(r.get("height", 0)) for r in chart.iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.01)
    assert heights[2] == pytest.approx(4 * heights[0], rel=0.01)


def test_treemap_areas_are_in_proportion_and_do_not_overlap() -> None:
    values = [50.0, 1.0, 20.0, 20.0, 9.0]
    boxes = squarify(values, Box(0, 0, 100, 40))
    for value, box in zip(values, boxes, strict=True):
        assert box.w * box.h == pytest.approx(value * 40)
        assert -1e-6 <= box.x <= box.x + box.w <= 100 + 1e-6
        assert -1e-6 <= box.y <= box.y + box.h <= 40 + 1e-6
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            wide = min(a.x + a.w, b.x + b.w) - max(a.x, b.x)
            high = min(a.y + a.h, b.y + b.h) - max(a.y, b.y)
            assert wide < 1e-6 or high < 1e-6


def test_ticks() -> None:
    assert decades(1e-3, 10) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])
    assert len(decades(1e-20, 1)) <= 6
    assert round_ticks(0, 10) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert round_ticks(3, 3) == [3]
    assert [number(v) for v in (0.001, 1e-7, 250, 0)] == ["0.001", "1e-7", "250", "0"]


def test_sizes_for_people() -> None:
    assert [plots.size(v) for v in (940, 12_300, 4.56e6, 2e9)] == ["940 B", "12.3 kB", "4.56 MB", "2 GB"]
