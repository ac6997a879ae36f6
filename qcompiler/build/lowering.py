"""Run a pipeline and keep the model as it was just before lowering, where floats and codes lie side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompiler.errors import BadOption
from qcompiler.graph.sites import find_sites
from qcompiler.measure.memory import give_back, spill
from qcompiler.model import Model
from qcompiler.pipeline import PassReport, Pipeline
from qcompiler.progress import Progress


@dataclass(frozen=True)
class Lowering:
    """A model at the three stages that later steps compare.

    Attributes:
        original: as it came in.
        rounded: transformed, planned and rounded, its graph still float.
        lowered: the QDQ graph; None if the pipeline was stopped after planning.
        reports: one a pass.
        transformed: one a pass: whether it changed the float graph (lowering does not count).
    """

    original: Model
    rounded: Model
    lowered: Model | None
    reports: list[PassReport]
    transformed: list[bool]


def lower(model: Model, pipeline: Pipeline, progress: Progress, *, only_plan: bool = False) -> Lowering:
    """Run the passes on a copy of `model`.

    Args:
        model: a float model with its calibration and cache.
        pipeline: the passes.
        progress: what the passes report to.
        only_plan: stop as soon as there is a plan.

    Raises:
        BadOption: the pipeline rounds without a plan, or ends without a lowered graph.
        QcompilerError: whatever a pass raises.
    """
    work, rounded = model.clone(), model
    reports: list[PassReport] = []
    transformed: list[bool] = []
    for item in pipeline.passes:
        rounded = rounded if work.lowered else work.clone()
        before = work.parts()
        if item.makes_codes and work.plan is model.plan and not work.plan.sites:
            what = f"the pass '{item.registered_name()}' rounds what is planned, and no pass before it makes a plan"
            raise BadOption(what, "--pipeline", "put 'allocate' or 'uniform' in front of it")
        reports += replace(pipeline, passes=[item]).run(work, progress)
        transformed.append(not work.lowered and work.parts() != before)
        spill(work, model)
        give_back((*model.graph.initializers.values(), *work.graph.initializers.values()))
        if only_plan and work.plan is not model.plan:  # perhaps an empty one: there may be nothing to decide
            return Lowering(model, work, None, reports, transformed)
    if only_plan:
        raise BadOption("the pipeline makes no plan", "--explain", "put 'allocate' or 'uniform' in the pipeline")
    if not work.lowered:
        raise BadOption("the pipeline does not lower the model", "--pipeline", "end it with the pass 'insert-qdq'")
    if not rounded.weights and not rounded.ranges and find_sites(model.ir):
        progress.note("nothing is quantized: all weights and activations stay float")
    return Lowering(model, rounded, work, reports, transformed)
