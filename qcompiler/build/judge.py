"""Judge an artifact: against its QDQ reference (must agree) and against the original (how good it is)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.artifact import REFERENCE, FreshProcess
from qcompiler.artifact.agreement import Agreement
from qcompiler.artifact.spread import Reference
from qcompiler.build.samples import FEW, Samples, batch_for
from qcompiler.build.score import Score, rows
from qcompiler.evaluate.classes import kinds_of_outputs
from qcompiler.measure.loss import Kind
from qcompiler.measure.memory import give_back
from qcompiler.measure.runner import Runner
from qcompiler.measure.shorten import shortened
from qcompiler.model import Model
from qcompiler.progress import Progress
from qcompiler.scratch import spilled
from qcompiler.target import Feeds, Outputs, Tolerance

_MOST_BYTES = 64_000_000  # of the outputs of each kind of inputs
_LARGE = 24_000_000  # a sample with larger outputs (logits of a language model) is shortened if it is a text
CALIBRATION, HELD_BACK = "calibration", "held back"


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        verification: one entry a kind of inputs, as `Agreement.conclude` makes it.
        fidelity: sqnr_db, kl, top1_agreement against the original; None where undefined. On held-back samples,
            or on the calibration samples where none are held back.
        loss: the loss that allocation predicts, of the artifact, on the same samples; None where it is not finite.
        held_back: samples that fidelity was taken on; 0 if these are the calibration samples.
        batch: samples a run, such that the outputs of a run stay small.
        length: positions of a text that were run, for the same reason; None: all.
        kinds: what each output is: KL and top-1 are of the one with class scores.
    """

    verification: list[dict[str, Any]]
    fidelity: dict[str, float | None]
    loss: float | None
    held_back: int
    batch: int
    length: int | None
    kinds: dict[str, Kind]


def judge(
    folder: Path, target: str, tolerance: Tolerance, original: Model, samples: Samples, progress: Progress
) -> Judgement:
    """Run an artifact in a fresh process on calibration, random and held-back samples.

    Raises:
        VerificationFailed: it does not run, or differs from its reference by more than the tolerance.
    """
    progress.note("verifying in a fresh process")
    batch, length, kinds, truths = _inputs_and_outputs(original, samples)
    outputs = _outputs(FreshProcess(target, folder), [feed for part in kinds.values() for feed in part])
    reference = Reference(ir.load(folder / REFERENCE), tolerance.noise)
    verification: list[dict[str, Any]] = []
    kinds_of = kinds_of_outputs(kinds[CALIBRATION][0], truths[CALIBRATION][0])
    score, judged_by = Score(kinds_of), HELD_BACK if samples.held_back else CALIBRATION
    for kind, part in kinds.items():
        agreement = Agreement(kind, reference, tolerance, FEW)
        for feed, wanted in zip(part, truths[kind], strict=True):
            found = next(outputs)
            agreement.add(feed, found, wanted, rows([feed]))
            if kind == judged_by:
                score.add(feed, wanted, found)
        verification.append(agreement.conclude())
    held_back = score.samples if samples.held_back else 0
    return Judgement(verification, score.fidelity, score.loss, held_back, batch, length, kinds_of)


def _inputs_and_outputs(
    original: Model, samples: Samples
) -> tuple[int, int | None, dict[str, list[Feeds]], dict[str, list[Outputs]]]:
    """Samples a run, positions of a text, the batches of each kind, and what the original makes of them.

    All before the reference is opened, so that the weights of both need not be in memory together.
    """
    truth = Runner(original.ir)
    first = next(samples.used.batches(1, 1))
    one = sum(array.nbytes for array in truth(first).values())
    length = None
    if one > _LARGE:
        length = max(1, max((a.shape[1] for a in first.values() if a.ndim == 2), default=1) * _LARGE // one)
        one = sum(array.nbytes for array in truth(shortened(original.ir, first, length)).values())
    batch = batch_for(one, samples.batch)
    kinds: dict[str, list[Feeds]] = {
        kind: [shortened(original.ir, feed, length) for feed in part]
        for kind, part in _inputs(samples, batch, max(1, _MOST_BYTES // max(one, 1))).items()
    }
    truths: dict[str, list[Outputs]] = {
        kind: [{name: spilled(array) for name, array in truth(feed).items()} for feed in part]
        for kind, part in kinds.items()
    }
    del truth
    give_back(original.graph.initializers.values())
    return batch, length, kinds, truths


def _outputs(process: FreshProcess, feeds: list[Feeds]) -> Iterator[Outputs]:
    """What the artifact makes of the inputs; it has run when this returns."""
    results = process.run(feeds)
    return chain([next(results)], results)


def _inputs(samples: Samples, batch: int, most: int) -> dict[str, list[Feeds]]:
    """Batches of each kind, at most `most` samples of each."""
    kinds: dict[str, list[Feeds]] = {
        CALIBRATION: list(samples.used.batches(batch, min(FEW, most))),
        "random": list(samples.random.batches(batch, min(FEW, most))),
    }
    if samples.held_back:
        kinds[HELD_BACK] = list(samples.held.batches(batch, min(samples.held.count, most)))
    return kinds
