"""The rule by which an artifact agrees with its QDQ reference, or does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.artifact.spread import DRAWS, Reference
from qcompiler.artifact.verify import distances
from qcompiler.errors import VerificationFailed
from qcompiler.target import Feeds, Outputs, Tolerance

FACTOR = 1.5  # times the reference's own noisy runs; measured: 0.4 to 0.9 on image and sentence models
MORE_DRAWS = 16  # before an artifact is refused: where flips are rare, a few draws may have met none
_FLIPS = 2  # elements of an integer output that may differ where activations are rounded
RULE = (
    f"every output within max(relative, {FACTOR:g} x spread) of the QDQ reference's; spread: the farthest that the "
    "reference itself goes when the numbers before each rounding are moved by noise x the rounding's reach"
)


@dataclass
class Agreement:
    """One kind of inputs, batch by batch.

    Attributes:
        kind: of inputs, for messages: "calibration".
        reference: what the artifact must agree with.
        tolerance: what the target declares.
        probed: samples on which spread and quantization error are measured; the first batch always is.
    """

    kind: str
    reference: Reference
    tolerance: Tolerance
    probed: int
    _count: int = 0
    _distance: dict[str, float] = field(default_factory=dict[str, float])
    _spread: dict[str, float] = field(default_factory=dict[str, float])
    _rounding: dict[str, float] = field(default_factory=dict[str, float])
    _flips: dict[str, float] = field(default_factory=dict[str, float])
    _feeds: dict[str, Feeds] = field(default_factory=dict[str, Feeds])

    @property
    def probing(self) -> bool:
        """Whether the next batch is to be probed, for which `add` wants the original's outputs."""
        return self._count < self.probed

    def add(self, feeds: Feeds, outputs: Outputs, original: Outputs | None, count: int) -> None:
        """Compare one batch.

        Args:
            feeds: the inputs.
            outputs: the artifact's.
            original: the float model's, to say how large the quantization error is.
            count: samples in the batch.

        Raises:
            VerificationFailed: an output is missing or has another shape or type.
        """
        expected = self.reference(feeds)
        for name, far in distances(outputs, expected).items():
            if far >= self._distance.get(name, 0.0):
                self._distance[name], self._feeds[name] = far, feeds
        for name, array in expected.items():
            if not np.issubdtype(array.dtype, np.floating) and self.tolerance.noise:
                self._flips[name] = max(self._flips.get(name, 0.0), _FLIPS / max(array.size, 1))
        if self.probing:
            _raise_to(self._spread, self.reference.spread(feeds, expected))
            _raise_to(self._rounding, distances(expected, original) if original is not None else {})
        self._count += count

    def conclude(self) -> dict[str, Any]:
        """The entry of the manifest, for the output that comes nearest to what is allowed.

        Returns:
            inputs, samples, output, relative (its distance), spread, allowed, quantization (the reference's own
            distance from the original; None if not measured, or not finite).

        Raises:
            VerificationFailed: an output is farther away than allowed.
        """
        for name in [n for n in self._distance if self._ratio(n) > 1]:
            self._look_closer(name)
        name = max(self._distance, key=self._ratio, default="")
        if self._distance and self._ratio(name) > 1:
            raise self._failure(name)
        rounding = self._rounding.get(name, np.inf)
        return {
            "inputs": self.kind,
            "samples": self._count,
            "output": name,
            "relative": self._distance.get(name, 0.0),
            "spread": self._spread.get(name, 0.0),
            "allowed": self._allowed(name),
            "quantization": rounding if np.isfinite(rounding) else None,
        }

    def _allowed(self, name: str) -> float:
        return max(self.tolerance.relative, FACTOR * self._spread.get(name, 0.0), self._flips.get(name, 0.0))

    def _ratio(self, name: str) -> float:
        return self._distance[name] / self._allowed(name)

    def _look_closer(self, name: str) -> None:
        """More noisy runs on the very batch where an output is too far away."""
        feeds = self._feeds[name]
        draws = range(DRAWS, DRAWS + MORE_DRAWS)
        _raise_to(self._spread, self.reference.spread(feeds, self.reference(feeds), draws, long_sums=True))

    def _failure(self, name: str) -> VerificationFailed:
        allowed = f"its tolerance is {self._allowed(name):.1e} ({self.tolerance.reason})"
        what = (
            f"the compiled model differs from its QDQ reference by {self._distance[name]:.2e} (output '{name}', on "
            f"{self.kind} inputs); {allowed}"
        )
        return VerificationFailed(what, fix="please report this with the model, or try another --target")


def _raise_to(largest: dict[str, float], found: dict[str, float]) -> None:
    for name, value in found.items():
        largest[name] = max(largest.get(name, 0.0), value)
