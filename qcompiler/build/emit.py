"""From a lowered model to a verified folder with manifest and report."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler import registry
from qcompiler.artifact import REPORT, new_folder, save_reference, write_manifest
from qcompiler.artifact.agreement import RULE
from qcompiler.artifact.manifest import sha256
from qcompiler.budget import bits_per_weight, lowered_bytes, parse_budget, stored_bytes
from qcompiler.build.judge import Judgement, judge
from qcompiler.build.layers import alone, extremes
from qcompiler.build.lowering import Lowering
from qcompiler.build.memory import realised_peak
from qcompiler.build.recipe import Options
from qcompiler.build.samples import FEW, Samples
from qcompiler.errors import BudgetInfeasible
from qcompiler.graph.uncounted import uncounted_weights
from qcompiler.measure.shorten import shortened
from qcompiler.overrun import overrun
from qcompiler.pipeline import PassReport, Pipeline
from qcompiler.plan import Plan
from qcompiler.progress import Progress
from qcompiler.report.html import render
from qcompiler.report.json import collect
from qcompiler.target import Backend, Compiled

_LAYER_SHARE = 0.05  # of the time so far for losses of single layers, within bounds
_LEAST_SECONDS, _MOST_SECONDS = 5.0, 20.0


def emit(
    lowering: Lowering, out: Path, options: Options, pipeline: Pipeline, samples: Samples, path: Path | None,
    start: float, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write the artifact of a lowered model to `out`, all or nothing; return its manifest.

    Args:
        lowering: with a lowered model.
        out: the folder.
        options: of the user.
        pipeline: that was run.
        samples: that it was run and is judged with.
        path: the original's file, if it was one.
        start: `time.monotonic()` at the beginning of the compilation.
        progress: shows what is done.

    Raises:
        OutputError: the folder cannot be written.
        VerificationFailed: the target's files do not compute what the QDQ reference computes.
    """
    lowered = lowering.lowered
    assert lowered is not None
    backend: Backend = registry.find("backends", options.target)()
    _check_budgets(lowering, options, progress)
    with new_folder(out) as folder:
        save_reference(lowered.ir, folder)
        progress.note(f"compiling for target {options.target}")
        compiled = backend.compile(lowered, folder, progress)
        judgement = judge(folder, options.target, compiled.tolerance, lowering.original, samples, progress)
        seconds = min(max(_LEAST_SECONDS, _LAYER_SHARE * (time.monotonic() - start)), _MOST_SECONDS)
        held = [
            shortened(lowering.original.ir, feed, judgement.length)
            for feed in samples.held.batches(judgement.batch, judgement.batch)
        ]
        realised = alone(lowering.rounded, held, seconds, progress)
        seen = extremes(lowering.rounded, FEW)
        entries = {
            **_made(options, pipeline, samples, path, judgement),
            **_model(lowering),
            **_result(lowering, compiled, judgement),
            "realised": realised,
            "seconds": time.monotonic() - start,
            "peak_rss_bytes": realised_peak(),
        }
        page = render(collect(lowering.rounded, lowering.reports, entries, realised, seen))
        (folder / REPORT).write_text(page, "utf-8")
        return write_manifest(folder, entries)


def _check_budgets(lowering: Lowering, options: Options, progress: Progress) -> None:
    """See whether a pass behind the planner has made the model larger than the budget.

    A budget that the user has given is refused; one that only the pipeline names is that of its planner, whose plan
    other passes of the same pipeline may have been put there to change: the user is told.
    """
    assert lowering.lowered is not None
    why = "a pass behind the planner made it larger"
    over = overrun(lowering.rounded, map(parse_budget, options.budget), lowered_bytes(lowering.lowered.ir))
    if over is not None and "budget" in options.given:
        raise BudgetInfeasible(*over.words(why, "give a smaller budget, or drop that pass or --budget"))
    if over is not None:
        progress.note(f"the result stores {over.stored}, more than {over.budget}: {why}")


def _made(
    options: Options, pipeline: Pipeline, samples: Samples, path: Path | None, judgement: Judgement
) -> dict[str, Any]:
    """How the artifact was made."""
    original = None
    if path is not None:
        original = {"path": str(path.resolve()), "sha256": sha256(path), "bytes": path.stat().st_size}
    calibration = {
        **samples.source.to_json(),
        "fingerprint": samples.used.fingerprint,
        "samples": samples.used.count,
        "held_back": judgement.held_back,
        "synthetic": samples.used.synthetic,
    }
    return {
        "qcompiler": version("qcompiler"),
        "target": options.target,
        "budget": list(options.budget),
        "keep": list(options.keep),
        "seed": options.seed,
        "activations": options.activations,
        "pipeline": pipeline.to_toml(),
        "original": original,
        "calibration": calibration,
    }


def _model(lowering: Lowering) -> dict[str, Any]:
    """What the model is."""
    original, rounded, lowered = lowering.original, lowering.rounded, lowering.lowered
    assert lowered is not None
    return {
        "name": original.name,
        "inputs": [_value(v) for v in original.graph.inputs if v.name not in original.graph.initializers],
        "outputs": [_value(v) for v in original.graph.outputs],
        "plan": rounded.plan.to_json(),
        "bits_per_weight": bits_per_weight(rounded),
        "uncounted": [asdict(weight) for weight in uncounted_weights(original.ir)],
        "stored_bytes": lowered_bytes(lowered.ir),
        "fp32_bytes": stored_bytes(original, Plan()),
    }


def _result(lowering: Lowering, compiled: Compiled, judgement: Judgement) -> dict[str, Any]:
    """How good it is."""
    solution = lowering.rounded.plan.solution
    return {
        "predicted_loss": solution.get("predicted_loss"),
        "realised_loss": judgement.loss,
        "lower_bound": solution.get("lower_bound"),
        "gap": solution.get("gap"),
        "fidelity": judgement.fidelity,
        "output_kinds": judgement.kinds,
        "tolerance": {**asdict(compiled.tolerance), "rule": RULE},
        "verification": judgement.verification,
        "facts": dict(compiled.facts),
        "passes": [_pass(*each) for each in zip(lowering.reports, lowering.transformed, strict=True)],
    }


def _pass(report: PassReport, transformed: bool) -> dict[str, Any]:
    refused = [{"where": r.where, "reason": r.reason} for r in report.refused]
    return {
        "name": report.name,
        "changed": report.changed,
        "transformed": transformed,
        "refused": refused,
        "seconds": report.seconds,
    }


def _value(value: ir.Value) -> dict[str, Any]:
    shape = [] if value.shape is None else [d if isinstance(d, int) else str(d) for d in value.shape]
    dtype = "float32" if value.dtype is None else value.dtype.numpy().name
    return {"name": value.name, "dtype": dtype, "shape": shape}
