"""Judge an artifact: against its QDQ reference (must agree) and against the original (how good it is)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.artifact import REFERENCE, FreshProcess
from qcompiler.artifact.agreement import Agreement
from qcompiler.artifact.spread import Reference
from qcompiler.build.samples import FEW, Samples, batch_for
from qcompiler.build.score import Score, rows
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.progress import Progress
from qcompiler.target import Feeds, Tolerance

_MOST_BYTES = 256_000_000  # of the outputs of each kind of inputs, which wait on disk
HELD_BACK = "held back"


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        verification: one entry a kind of inputs, as `Agreement.conclude` makes it.
        fidelity: sqnr_db, kl, top1_agreement against the original on held-back samples; None where undefined.
        loss: the loss that allocation predicts, of the artifact, on held-back samples.
        held_back: samples that fidelity was taken on.
        batch: samples a run, such that the outputs of a run stay small.
    """

    verification: list[dict[str, Any]]
    fidelity: dict[str, float | None]
    loss: float
    held_back: int
    batch: int


def judge(
    folder: Path, target: str, tolerance: Tolerance, original: Model, samples: Samples, progress: Progress
) -> Judgement:
    """Run an artifact in a fresh process on calibration, random and held-back samples.

    Raises:
        VerificationFailed: it does not run, or differs from its reference by more than the tolerance.
    """
    progress.note("verifying in a fresh process")
    truth, reference = Runner(original.ir), Reference(ir.load(folder / REFERENCE), tolerance.noise)
    one = sum(array.nbytes for array in truth(next(samples.used.batches(1, 1))).values())
    batch = batch_for(one, samples.batch)
    kinds = _inputs(samples, batch, max(1, _MOST_BYTES // max(one, 1)))
    results = FreshProcess(target, folder).run([feed for part in kinds.values() for feed in part])
    verification: list[dict[str, Any]] = []
    score = Score()
    for kind, part in kinds.items():
        agreement = Agreement(kind, reference, tolerance, FEW)
        for feed in part:
            outputs = next(results)
            wanted = truth(feed) if agreement.probing or kind == HELD_BACK else None
            agreement.add(feed, outputs, wanted, rows([feed]))
            if kind == HELD_BACK and wanted is not None:
                score.add(feed, wanted, outputs)
        verification.append(agreement.conclude())
    return Judgement(verification, score.fidelity, score.loss, score.samples, batch)


def _inputs(samples: Samples, batch: int, most: int) -> dict[str, list[Feeds]]:
    """Batches of each kind, at most `most` samples of each."""
    return {
        "calibration": list(samples.used.batches(batch, min(FEW, most))),
        "random": list(samples.random.batches(batch, min(FEW, most))),
        HELD_BACK: list(samples.held.batches(batch, min(samples.held.count, most))),
    }
