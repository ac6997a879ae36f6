"""Every pass that is declared EXACT keeps the function of every architecture with outliers, or says why it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import registry
from qcompiler.calibration import Calibration
from qcompiler.errors import PassRefused
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.pipeline import EXACT, Pass, PassReport, Pipeline
from qcompiler.progress import Silent
from tests.graph.architectures import ARCHITECTURES, feeds_for, inject_outliers

BOUND = 1e-5  # max|y - y'| / max|y|
FEW = ("gpt2", "llama-gqa", "mobilenet")
# Name -> settings of each run; where a run learns or tries things, it is short.
SETTINGS: Mapping[str, tuple[Mapping[str, object], ...]] = {
    "awq": ({"spec": "int4-sym-channel-fp16", "grid": 3},),
    "center-norms": ({},),
    "channel-order": ({"block": 4},),
    "dual-scale": ({"spec": "int4-sym-channel-fp16", "rounds": 2},),
    "equalize": ({"sweeps": 3}, {"sweeps": 3, "clips": True}),
    "join-panels": ({},),
    "lorc": ({"rank": 2, "share": 16.0}, {"rank": 2, "share": 16.0, "factor_bits": 8}),
    "pca-split": ({}, {"heads": True, "share": 0.25}),
    "rotate": ({"heads": True}, {"block": 4}, {"heads": True, "online": True, "keys": True}),
    "scale-fold": ({},),
    "smooth": ({}, {"sites": "all", "percentile": 99.0}),
    "smooth-attention": ({},),
    "split-panels": ({"panels": 2, "align": 4, "least": 4},),
    "svdquant": ({"rank": 2, "share": 16.0, "grid": 3, "sweeps": 5, "spec": "int4-sym-channel-fp16"},),
}
SLOW: Mapping[str, Mapping[str, object]] = {
    "choose-transforms": {"seconds": 2.0, "rounding": "nearest"},
    "smooth-plus": {"spec": "int4-sym-channel-fp16", "samples": 2},
    "mobilequant": {"epochs": 1, "samples": 4, "batch": 4},
    "spinquant": {"epochs": 1, "samples": 4, "batch": 4, "heads": True},
}
PLANNED = ("lorc", "mobilequant", "spinquant")  # these come behind a plan
EXACT_PASSES = [name for name in registry.PASSES if registry.find("passes", name).contract == EXACT]
SHORT = SLOW | {name: {} for name in EXACT_PASSES if name not in SETTINGS and name not in SLOW}
CASES = [
    *((name, name_of, options) for name, runs in SETTINGS.items() for options in runs for name_of in ARCHITECTURES),
    *((name, name_of, options) for name, options in SHORT.items() for name_of in FEW),
]


@cache
def loud_model(name: str) -> tuple[ir.Model, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """An architecture with outliers, loud inputs, and what comes out."""
    graph = ARCHITECTURES[name]()
    inject_outliers(graph)
    feeds = feeds_for(graph, loud=True)
    return graph, feeds, Runner(graph)(feeds)


def difference(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(wanted[k] - found[k]).max() / np.abs(wanted[k]).max()) for k in wanted)


@pytest.mark.parametrize(
    ("name", "architecture", "options"), CASES, ids=[f"{a}-{b}-{','.join(c) or 'plain'}" for a, b, c in CASES]
)
def test_the_function_stays(name: str, architecture: str, options: Mapping[str, object]) -> None:
    _, feeds, wanted = loud_model(architecture)
    work, report = taken(name, architecture, options)
    moved = difference(wanted, Runner(work.ir)(feeds))
    assert moved <= (BOUND if report.changed else 0)
    assert all(refusal.reason for refusal in report.refused)


@pytest.mark.parametrize("name", SETTINGS)
def test_none_of_them_refuses_everywhere(name: str) -> None:
    """Else the test above would say nothing. What joins panels has none to join here."""
    runs = ((a, options) for a in ARCHITECTURES for options in SETTINGS[name])
    assert any(taken(name, a, options)[1].changed for a, options in runs) == (name != "join-panels")


def taken(name: str, architecture: str, options: Mapping[str, object]) -> tuple[Model, PassReport]:
    """A pass on a copy of an architecture, planned where it asks for a plan."""
    graph = loud_model(architecture)[0]
    work = Model(graph.clone(), calibration=Calibration.from_arrays(feeds_for(graph, batch=8), graph))
    if name in PLANNED:
        Uniform(spec="int4-sym-channel-fp16").run(work, Silent())
    item: Pass = registry.find("passes", name)(**options)
    try:
        item.requires(work)
        return work, item.run(work, Silent())
    except PassRefused:
        return work, PassReport(name)


@pytest.mark.parametrize("name", ["moe", "moe-stacked", "packed", "merged", "efficientnet"])
def test_rotate_reaches_these_forms(name: str) -> None:
    graph = loud_model(name)[0].clone()
    (report,) = Pipeline([registry.find("passes", "rotate")(heads=True, online=True)]).run(Model(graph))
    streams = report.metrics.get("streams", {})
    assert (len(streams) == 1) == (name != "efficientnet")
    assert len(report.metrics.get("heads", {})) == (0 if name in ("merged", "efficientnet") else 2)
    assert report.metrics["online"]
