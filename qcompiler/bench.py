"""Speed side by side: the artifact, ONNX Runtime on the original, and ONNX Runtime's best form of the same model.

All run in one process, one after the other and again, so that whatever else the machine does hits all alike. ORT's
best form is the faster of the QDQ reference as it is and of what target "onnx" makes of it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler import registry
from qcompiler.artifact import Artifact
from qcompiler.artifact.original import original_path
from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.errors import QcompilerError
from qcompiler.folders import temporary_folder
from qcompiler.model import Model
from qcompiler.progress import Progress
from qcompiler.target import Backend, Feeds, Runnable

_MOST_RUNS = 2000
_WARM, _LEAST, _WANTED = 2, 5, 20  # rounds


@dataclass(frozen=True)
class Bench:
    """Times of one run in seconds, medians over interleaved runs.

    Attributes:
        medians: by name: "artifact", "ort_fp32", "ort_qdq" (the QDQ reference as it is) and, where it is not the
            artifact itself and ONNX Runtime takes it, "ort_kernels" (what target onnx makes of the reference).
        best: which of ORT's forms of the quantized model is the fastest; "artifact" where it is the artifact.
        threads: that all may use.
        runs: of each.
        batch: samples a run.
    """

    medians: dict[str, float]
    best: str
    threads: int
    runs: int
    batch: int

    @property
    def speedup_vs_ort_fp32(self) -> float:
        """How many times faster than ONNX Runtime on the fp32 original."""
        return self.medians["ort_fp32"] / self.medians["artifact"]

    @property
    def speedup_vs_ort_best(self) -> float:
        """How many times faster than the fastest form that ONNX Runtime has of the same quantized model."""
        return self.medians[self.best] / self.medians["artifact"]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "speedup_vs_ort_fp32": self.speedup_vs_ort_fp32,
            "speedup_vs_ort_best": self.speedup_vs_ort_best,
            "threads": self.threads,
            "medians": self.medians,
            "ort_best": self.best,
            "ort_best_is_artifact": self.best == "artifact",
            "runs": self.runs,
            "batch": self.batch,
        }


def bench(
    artifact: Artifact,
    reference: Path | None,
    batch: int,
    seconds: float,
    progress: Progress,
    feeds: Feeds | None = None,
) -> Bench:
    """Measure an artifact against ONNX Runtime.

    Args:
        artifact: what to measure.
        reference: the original, where the file that the manifest remembers is gone.
        batch: samples a run, where the model leaves its first axis open and `feeds` is None.
        seconds: for all runs together; three times that where it does not suffice for 20 of each, and at least 5
            of each are made.
        progress: notes go there.
        feeds: inputs of a run; made at random if None.

    Raises:
        BadModel: the original is gone or was changed.
    """
    path = original_path(artifact, reference)
    threads = len(os.sched_getaffinity(0))
    inputs = feeds or next(Calibration.synthetic_for(load_onnx(path).ir, batch, text=False).batches(batch, batch))
    with temporary_folder("bench") as folder:
        contestants: dict[str, Callable[[Feeds], Any]] = {
            "artifact": artifact.runnable.run,
            "ort_fp32": _session(path, threads),
            "ort_qdq": _session(artifact.reference, threads),
        }
        kernels = _kernels(artifact, folder, progress)
        if kernels is not None:
            contestants["ort_kernels"] = kernels.run
        times = _interleave(contestants, inputs, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = "artifact" if artifact.manifest["target"] == "onnx" else "ort_kernels"
    best = min((name for name in medians if name in ("ort_qdq", own)), key=medians.__getitem__)
    rows = next((len(a) for a in inputs.values() if a.ndim), 1)
    return Bench(medians, best, threads, len(times["artifact"]), rows)


def _interleave(contestants: dict[str, Callable[[Feeds], Any]], feeds: Feeds, seconds: float) -> dict[str, list[float]]:
    """Times of all contestants, each round in the opposite order of the last; the first ones do not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, rounds = time.monotonic(), 0
    while _goes_on(rounds - _WARM, time.monotonic() - start, seconds):
        order = list(contestants) if rounds % 2 else list(reversed(contestants))
        for name in order:
            begin = time.perf_counter()
            contestants[name](feeds)
            times[name].append(time.perf_counter() - begin)
        rounds += 1
        if rounds == _WARM:
            start = time.monotonic()
    return {name: values[_WARM:] for name, values in times.items()}


def _goes_on(rounds: int, passed: float, seconds: float) -> bool:
    """Whether another round is due after so many that count."""
    if rounds < _LEAST:
        return True
    return rounds < _MOST_RUNS and passed < (seconds if rounds >= _WANTED else 3 * seconds)


def _session(path: Path, threads: int) -> Callable[[Feeds], Any]:
    """ONNX Runtime with all its optimisations and default numerics."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, dict(feeds))


def _kernels(artifact: Artifact, folder: Path, progress: Progress) -> Runnable | None:
    """What target "onnx" makes of the QDQ reference; None if that is the artifact itself, or it refuses."""
    if artifact.manifest["target"] == "onnx":
        return None
    backend: Backend = registry.find("backends", "onnx")()
    try:
        backend.compile(Model(ir.load(artifact.reference), lowered=True), folder, progress)
        return backend.load(folder)
    except QcompilerError as error:
        progress.note(f"target onnx does not take this model ({error}); comparing with the QDQ form only")
        return None
