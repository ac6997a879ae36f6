"""How faithful a compiled model is to the float model, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.measure.loss import Kind, output_kind, output_loss

__all__ = ["FidelityMeter", "fidelity", "output_loss"]
Array = npt.NDArray[Any]
_TINY = 1e-12
_LEAST = 1e-30  # noise, relative to the signal: an exact copy has 300 dB


def fidelity(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], kinds: Mapping[str, Kind] | None = None
) -> dict[str, float | None]:
    """Compare all outputs at once; see `FidelityMeter` for what comes back."""
    meter = FidelityMeter(kinds)
    meter.add(reference, outputs)
    return meter.result()


class FidelityMeter:
    """SQNR of all outputs, KL divergence and top-1 agreement of the one with class scores, batch by batch.

    Args:
        kinds: what an output is, where `measure.loss.output_kind` should not decide (by the first batch); see
            `evaluate.classes`.

    Attributes:
        class_output: the first output with class scores, which alone counts for KL and top-1; None: no output.
    """

    def __init__(self, kinds: Mapping[str, Kind] | None = None) -> None:
        self._given: dict[str, Kind] = dict(kinds or {})
        self._kinds: dict[str, Kind] = {}
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}
        self._divergence, self._agreed, self._rows = 0.0, 0, 0
        self.class_output: str | None = None

    def add(self, reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Count one batch in.

        Args:
            reference: the float model's outputs by name; those that are not floats do not count.
            outputs: of the other model, in the same shapes.
        """
        floating = {name: np.asarray(a) for name, a in reference.items() if np.asarray(a).dtype.kind == "f"}
        for name, ref in floating.items():
            if name not in self._kinds:
                self._kinds[name] = self._given[name] if name in self._given else output_kind(ref)
            out = np.asarray(outputs[name])
            if out.shape != ref.shape:
                raise ValueError(f"output '{name}' has shape {out.shape}, the reference {ref.shape}")
            wide = ref.astype(np.float64)
            self._signal[name] = self._signal.get(name, 0.0) + float((wide**2).sum())
            self._noise[name] = self._noise.get(name, 0.0) + float(((out - wide) ** 2).sum())
            if self._kinds[name] != "values" and self.class_output in (None, name):
                self.class_output = name
                self._add_classes(ref, out, self._kinds[name])

    def result(self) -> dict[str, float | None]:
        """What was seen so far.

        Returns:
            sqnr_db: 10 log10(signal / noise), the mean over the outputs that differ where there are several.
            kl: mean of KL(reference || output) over the rows, in nats; None where no output has class scores.
            top1_agreement: share of rows with the same best class; None likewise.
        """
        heard = [name for name, signal in self._signal.items() if signal > 0]
        heard = [name for name in heard if self._noise[name] > 0] or heard  # an exact copy says nothing of the rest
        ratios = [-10 * np.log10(max(self._noise[name] / self._signal[name], _LEAST)) for name in heard]
        return {
            "sqnr_db": float(np.mean(ratios)) if ratios else None,
            "kl": self._divergence / self._rows if self._rows else None,
            "top1_agreement": self._agreed / self._rows if self._rows else None,
        }

    def _add_classes(self, ref: Array, out: Array, kind: Kind) -> None:
        step = max(1, (1 << 20) // ref.shape[-1])
        ref, out = (a.reshape(-1, a.shape[-1]) for a in (ref, out))
        for i in range(0, len(ref), step):
            p, q = (_log_softmax(a[i : i + step], kind) for a in (ref, out))
            self._divergence += float((np.exp(p) * (p - q)).sum())
            self._agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        self._rows += len(ref)


def _log_softmax(z: Array, kind: Kind) -> npt.NDArray[np.float64]:
    wide = z.astype(np.float64)
    if kind == "probabilities":
        wide = np.log(np.maximum(wide, _TINY))
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)), np.float64)
