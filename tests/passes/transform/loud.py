"""Architectures with outlier channels as models with calibration data, and running passes on them."""

from __future__ import annotations

from qcompiler.calibration import Calibration
from qcompiler.model import Model
from qcompiler.pipeline import Pass, PassReport, Pipeline
from tests.graph.architectures import ARCHITECTURES, feeds_for, inject_outliers


def loud_model(name: str, batch: int = 8) -> Model:
    """An architecture by name, and so many samples."""
    graph = ARCHITECTURES[name]()
    inject_outliers(graph)
    return Model(graph, name, Calibration.from_arrays(feeds_for(graph, batch=batch), graph))


def run(model: Model, *passes: Pass) -> PassReport:
    """The last report; contracts are checked, with outliers injected into the inputs."""
    return Pipeline(passes).run(model)[-1]
