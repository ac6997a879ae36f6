"""What a plan's artifact takes in time, before anything is rounded: codes and grids don't change how long it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from qcompiler.folders import temporary_folder
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.latency import Effort, interleaved
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.quantized_values import choose_values
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent
from qcompiler.target import Backend

Feeds = Mapping[str, npt.NDArray[Any]]
EFFORT = Effort(windows=5, rounds=15, warm=5, seconds=10.0)  # of artifacts, which differ by a few per cent
_GRID = StaticRange(0.05, 128)


def trial_seconds(
    model: Model, plans: Sequence[Plan], backend: Backend, feeds: Feeds, progress: Progress, effort: Effort = EFFORT
) -> list[float]:
    """Seconds of one run of each plan's artifact, all measured in turns.

    Args:
        model: the float model; it is not changed. Weights are rounded to nearest and grids made up.
        plans: what to build.
        backend: builds and runs the artifacts.
        feeds: inputs of the run.
        progress: what the backend reports goes nowhere, the number of artifacts goes here.
        effort: how long to measure.
    """
    runs: dict[int, Callable[[], object]] = {}
    with ExitStack() as stack:
        for number, plan in progress.track(list(enumerate(plans)), "Building trial artifacts"):
            folder = stack.enter_context(temporary_folder("trial"))
            backend.compile(lowered(model, plan), folder, Silent())
            runs[number] = _run(backend, folder, feeds)
        seconds = interleaved(runs, effort)
    return [seconds[number] for number in range(len(plans))]


def lowered(model: Model, plan: Plan) -> Model:
    """The QDQ graph of a plan with codes to nearest and made-up grids."""
    copy = replace(model.clone(), plan=plan, weights={}, bias_shift={}, ranges={})
    sites = {site.name: site for site in find_sites(copy.ir)}
    products = {
        node
        for name, decided in plan.sites.items()
        if decided.activation == "static"
        for node in sites[name].users
        if node.op_type != "Gather"
    }
    copy.ranges = {str(t.value.name): _GRID for t in choose_values(copy.graph, products, outputs=False)}
    for name, decided in plan.sites.items():
        if decided.weight is not None:
            copy.weights[name] = quantize(sites[name].matrix(), decided.weight, "minmax")
    InsertQDQ().run(copy, Silent())
    return copy


def _run(backend: Backend, folder: Path, feeds: Feeds) -> Callable[[], object]:
    runnable = backend.load(folder)
    return lambda: runnable.run(feeds)
