"""Judge an artifact: against its QDQ reference (must agree) and against the original (how good it is)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.artifact import REFERENCE, FreshProcess, compare
from qcompiler.artifact.verify import check
from qcompiler.build.samples import Samples
from qcompiler.evaluate.fidelity import fidelity, output_loss
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.progress import Progress
from qcompiler.target import Feeds, Outputs, Tolerance

_MOST_BYTES = 256_000_000  # of outputs that are kept to compare


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        verification: one entry a kind of inputs: inputs, samples, relative, output.
        fidelity: sqnr_db, kl, top1_agreement against the original on held-back samples; None where undefined.
        loss: the loss that allocation predicts, of the artifact, on held-back samples.
        held_back: samples that fidelity was taken on.
    """

    verification: list[dict[str, Any]]
    fidelity: dict[str, float | None]
    loss: float
    held_back: int


def judge(
    folder: Path, target: str, tolerance: Tolerance, original: Model, samples: Samples, progress: Progress
) -> Judgement:
    """Run an artifact in a fresh process on calibration, random and held-back samples.

    Raises:
        VerificationFailed: it does not run, or differs from its reference by more than the tolerance.
    """
    progress.note("verifying in a fresh process")
    runner = Runner(original.ir)
    held, expected, count = _within(samples, runner)
    kinds = {"calibration": samples.feeds(samples.used), "random": samples.feeds(samples.random), "held back": held}
    feeds = [feed for part in kinds.values() for feed in part]
    reference = Runner(ir.load(folder / REFERENCE))
    results = iter(FreshProcess(target, folder).run(feeds))
    verification: list[dict[str, Any]] = []
    got: list[Outputs] = []
    for kind, part in kinds.items():
        entry: dict[str, Any] = {
            "inputs": kind,
            "samples": count if part is held else _rows(part),
            "relative": 0.0,
            "output": "",
        }
        for feed in part:
            outputs = next(results)
            comparison = compare(outputs, reference(feed))
            check(comparison, tolerance, f"on {kind} inputs")
            if comparison.relative >= entry["relative"]:
                entry |= {"relative": comparison.relative, "output": comparison.output}
            if part is held:
                got.append(outputs)
        verification.append(entry)
    whole, truth = samples.held.join(got), samples.held.join(expected)
    return Judgement(verification, figures(truth, whole), float(output_loss(truth, whole)), count)


def figures(reference: Outputs, outputs: Outputs) -> dict[str, float | None]:
    """Fidelity with None where a figure is not finite (an exact copy has no SQNR)."""
    found = fidelity(reference, outputs)
    values = {name: found.get(name) for name in ("sqnr_db", "kl", "top1_agreement")}
    return {name: None if v is None or not np.isfinite(v) else float(v) for name, v in values.items()}


def _within(samples: Samples, runner: Runner) -> tuple[list[Feeds], list[Outputs], int]:
    """Held-back batches whose outputs together stay within a bound, the original's outputs, and the samples."""
    feeds: list[Feeds] = []
    outputs: list[Outputs] = []
    size = 0
    for feed in samples.held.batches(samples.batch):
        if feeds and size >= _MOST_BYTES:
            break
        feeds.append(feed)
        outputs.append(runner(feed))
        size += sum(array.nbytes for array in outputs[-1].values())
    return feeds, outputs, _rows(feeds)


def _rows(feeds: list[Feeds]) -> int:
    return sum(next((len(a) for a in feed.values() if a.ndim), 1) for feed in feeds)
