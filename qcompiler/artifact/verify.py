"""Verification: the artifact, run in a fresh process, must compute what its QDQ reference computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil

from qcompiler.errors import VerificationFailed
from qcompiler.folders import temporary_folder
from qcompiler.target import Feeds, Outputs

PEAK = "peak"  # name of the file in which a fresh process says how much memory it took


@dataclass(frozen=True)
class Comparison:
    """How far outputs are from a reference.

    Attributes:
        relative: the largest ||y - ref|| / ||ref|| over the outputs.
        output: the output where it is reached.
    """

    relative: float
    output: str


def distances(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """The relative distance of every output, NaN counted as infinite where the reference has none.

    Raises:
        VerificationFailed: an output is missing or has another shape or type.
    """
    found: dict[str, float] = {}
    for name, expected in reference.items():
        got = outputs.get(name)
        if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
            form = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
            what = f"the artifact gives {form}, its QDQ reference {expected.dtype} {list(expected.shape)}"
            raise VerificationFailed(what, f"output '{name}'", "please report this")
        found[name] = _distance(got, expected)
    return found


def compare(outputs: Outputs, reference: Outputs) -> Comparison:
    """The largest of the `distances`, and where it is."""
    return worst(distances(outputs, reference))


def worst(found: Mapping[str, float]) -> Comparison:
    """The output that is farthest from its reference; distance 0 and no name where there are no outputs."""
    name = max(found, key=found.__getitem__, default="")
    return Comparison(found.get(name, 0.0), name)


def _distance(got: np.ndarray, expected: np.ndarray) -> float:
    if not np.issubdtype(expected.dtype, np.floating):
        return float(np.mean(got != expected)) if expected.size else 0.0
    a, b = got.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = np.where(same, 0.0, a - b)
    if not np.isfinite(difference).all():
        return float("inf")
    scale = float(np.linalg.norm(np.where(np.isfinite(b), b, 0.0)))
    distance = float(np.linalg.norm(difference))
    return distance / scale if scale > 0 else (np.inf if distance > 0 else 0.0)


class FreshProcess:
    """Runs an artifact's files in a new Python process with limits on memory and time.

    Args:
        target: name of the backend.
        folder: the artifact, complete or not yet.
        timeout: seconds for all feeds together.

    Attributes:
        together: the most that this process held while such a process ran, and the peak of that, in bytes.
    """

    together: ClassVar[int] = 0

    def __init__(self, target: str, folder: Path, timeout: float = 1800.0) -> None:
        self.target, self.folder, self.timeout = target, folder, timeout

    def run(self, feeds: Sequence[Feeds]) -> Iterator[Outputs]:
        """The outputs for each of the feeds, in order; they wait on disk until they are asked for."""
        with temporary_folder("verify") as folder:
            inputs, outputs = folder / "in", folder / "out"
            inputs.mkdir()
            outputs.mkdir()
            for number, feed in enumerate(feeds):
                np.savez(inputs / f"{number}.npz", **{k: np.asarray(v) for k, v in feed.items()})  # type: ignore[arg-type]
            self._call(inputs, outputs)
            for number in range(len(feeds)):
                with np.load(outputs / f"{number}.npz", allow_pickle=False) as data:
                    result = dict(data)
                (outputs / f"{number}.npz").unlink()
                yield result

    def _call(self, inputs: Path, outputs: Path) -> None:
        command = [sys.executable, "-m", "qcompiler.artifact.worker", self.target, str(self.folder)]
        command += [str(inputs), str(outputs)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, errors="replace", timeout=self.timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise VerificationFailed(
                f"the compiled model did not finish in {self.timeout:.0f} s", f"target {self.target}"
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise VerificationFailed(f"the compiled model does not run ({last[:300]})", f"target {self.target}")
        peak = int(psutil.Process().memory_info().rss) + int((outputs / PEAK).read_text())
        FreshProcess.together = max(FreshProcess.together, peak)
