"""How far outputs are from the model's own: KL divergence for class scores, else normalised squared error.

Both are 0 for equal outputs and quadratic in small errors dz, 1/2 dz^T F dz with F the output's Fisher metric
(diag(p) - p p^T for KL; 2 I / ||z||^2 for the squared error). `Reference.sketch` gives vectors v with
1/2 v_a . v_b = 1/2 dz_a^T F dz_b, exactly where the output is small, without bias (over a fixed random choice of
coordinates; for KL of classes drawn from p) where it is large. So the cross terms of a quadratic loss model cost
one run a change instead of one a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Kind = Literal["logits", "probabilities", "values"]
PARTS = 8  # disjoint parts of the rows, for the spread of a loss
_CLASSES = 10
_PEAKED = 0.8
_CHUNK = 1 << 20  # elements worked on at a time
_TINY = 1e-12


def output_kind(output: Array) -> Kind:
    """What an output is, judged by a float batch of it.

    "probabilities": floats, not negative, that sum to 1 along the last axis. "logits": 2 or 3 axes, at least 10
    classes on the last one, and a softmax over them that is peaked: its entropy is on average below 0.8 ln(classes)
    (embeddings give nearly flat ones: 0.92 for standard normal values, 1.0 when normalised to length 1).
    "values": all else, such as boxes, maps, embeddings, states.
    """
    if output.dtype.kind != "f" or output.ndim < 2 or output.shape[-1] < 2 or output.size == 0:
        return "values"
    most = max(16, min(512, _CHUNK // output.shape[-1]))
    rows = output.reshape(-1, output.shape[-1])[:most].astype(np.float64)
    if not np.isfinite(rows).all():
        return "values"
    if rows.min() >= 0 and np.abs(rows.sum(-1) - 1).max() < 1e-3:
        return "probabilities"
    if output.ndim > 3 or output.shape[-1] < _CLASSES:
        return "values"
    p = np.exp(rows - rows.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean()
    return "logits" if entropy < _PEAKED * np.log(output.shape[-1]) else "values"


def output_loss(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], kinds: Mapping[str, Kind] | None = None
) -> float:
    """The loss of one batch, summed over the outputs: mean KL of a row in nats, or ||y - r||^2 / ||r||^2.

    Args:
        reference: the float model's outputs by name.
        outputs: of the changed model, in the same shapes.
        kinds: what an output is, where `output_kind` should not decide.
    """
    return float(Reference(reference, kinds).losses(outputs).mean())


class Reference:
    """The float model's outputs for one batch, against which many changed ones are measured.

    Args:
        outputs: by name; those that are not floats do not count.
        kinds: what an output is, where `output_kind` should not decide.
        width: numbers in a sketch.
        seed: of the sketch's choice of coordinates.
    """

    def __init__(
        self,
        outputs: Mapping[str, Array],
        kinds: Mapping[str, Kind] | None = None,
        width: int = 8192,
        seed: int = 0,
    ) -> None:
        floating = {name: a for name, a in outputs.items() if a.dtype.kind == "f" and a.size}
        self.kinds: dict[str, Kind] = {n: (kinds or {}).get(n) or output_kind(a) for n, a in floating.items()}
        rng = np.random.default_rng(seed)
        share = max(1, width // max(len(floating), 1))
        self._judges = {
            name: (_Values if self.kinds[name] == "values" else _Classes)(array, self.kinds[name], share, rng)
            for name, array in floating.items()
        }

    @property
    def rows(self) -> int:
        """Rows (samples, or tokens of samples) that the losses average over."""
        return max((judge.rows for judge in self._judges.values()), default=0)

    @property
    def width(self) -> int:
        """Numbers in a sketch."""
        return sum(judge.width for judge in self._judges.values())

    def losses(self, outputs: Mapping[str, Array]) -> npt.NDArray[np.float64]:
        """Float64 [8]: the loss on disjoint parts of the rows; its mean is the loss."""
        return self.measure(outputs)[0]

    def measure(self, outputs: Mapping[str, Array]) -> tuple[npt.NDArray[np.float64], Floats]:
        """`losses`, and the sketch of the change: float32 [width or less]."""
        total, sketches = np.zeros(PARTS), [np.zeros(0, np.float32)]
        for name, judge in self._judges.items():
            losses, sketch = judge.measure(np.asarray(outputs[name]))
            total += losses
            sketches.append(sketch)
        return total, np.concatenate(sketches)


def _in_parts(per_row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means over contiguous parts of equal weight: their mean is the mean of all. Few rows repeat."""
    rows = len(per_row)
    if rows < PARTS:
        return np.full(PARTS, per_row.mean()) if rows else np.zeros(PARTS)
    edges = np.arange(PARTS + 1) * rows // PARTS
    sums = np.add.reduceat(per_row, edges[:-1])
    return np.asarray(sums * (PARTS / rows), np.float64)


class _Values:
    """Normalised squared error."""

    def __init__(self, z: Array, kind: Kind, width: int, rng: np.random.Generator) -> None:
        del kind
        self._z = _rows(z)
        self.rows = len(self._z)
        # an output of zeros has no size that its error could be relative to
        self._power = float(np.einsum("ij,ij->", self._z, self._z, dtype=np.float64)) or 1.0
        size = self._z.size
        self._picked = None if size <= width else np.sort(rng.choice(size, width, replace=False))
        share = 1 if self._picked is None else size / width
        self.width = min(size, width)
        self._factor = float(np.sqrt(2 * share / self._power))

    def measure(self, y: Array) -> tuple[npt.NDArray[np.float64], Floats]:
        with np.errstate(invalid="ignore", over="ignore"):  # infinite outputs have a loss of NaN or infinity
            d = _rows(y) - self._z
        per_row = np.einsum("ij,ij->i", d, d, dtype=np.float64) * (self.rows / self._power)
        flat = d.ravel() if self._picked is None else d.ravel()[self._picked]
        return _in_parts(per_row), (flat.astype(np.float64) * self._factor).astype(np.float32)


class _Classes:
    """KL(reference || output), from the differences of logits: exact also where they are tiny."""

    def __init__(self, z: Array, kind: Kind, width: int, rng: np.random.Generator) -> None:
        self._kind: Kind = kind
        self._z = self._logits(z)
        self.rows, classes = self._z.shape
        self._p = np.empty_like(self._z)
        for part in self._chunks():
            e = np.exp(self._z[part] - self._z[part].max(-1, keepdims=True))
            self._p[part] = e / e.sum(-1, keepdims=True)
        self._picked: npt.NDArray[np.int64] | None = None
        self.width = self._z.size
        if self._z.size > width:
            draws = max(1, width // self.rows)
            self._picked = np.empty((self.rows, draws), np.int64)
            for row, p in enumerate(self._p):
                below = np.cumsum(p, dtype=np.float64)
                self._picked[row] = np.searchsorted(below, rng.random(draws) * below[-1])
            np.clip(self._picked, 0, classes - 1, out=self._picked)
            self.width = self._picked.size

    def measure(self, y: Array) -> tuple[npt.NDArray[np.float64], Floats]:
        z = self._logits(y)
        per_row, sketches = np.empty(self.rows), list[Floats]()
        for part in self._chunks():
            p = self._p[part]
            d = z[part] - self._z[part]
            d -= np.einsum("ij,ij->i", p, d)[:, None]
            per_row[part] = _divergence(p, d, self._z[part])
            if self._picked is None:
                sketches.append((np.sqrt(p) * d).ravel())
            else:
                sketches.append(np.take_along_axis(d, self._picked[part], 1).ravel())
        draws = 1 if self._picked is None else self._picked.shape[1]
        return _in_parts(per_row), np.concatenate(sketches) / np.float32(np.sqrt(draws * self.rows))

    def _chunks(self) -> list[slice]:
        step = max(1, _CHUNK // max(self._z.shape[1], 1))
        return [slice(i, min(i + step, self.rows)) for i in range(0, self.rows, step)]

    def _logits(self, z: Array) -> Floats:
        flat = _rows(z)
        return flat if self._kind == "logits" else np.log(np.maximum(flat, np.float32(_TINY)))


def _divergence(p: Floats, d: Floats, z: Floats) -> npt.NDArray[np.float64]:
    """KL of each row for changes d of the logits z with E_p[d] = 0: ln E_p[e^d] = ln(1 + E_p[e^d - 1 - d])."""
    top = d.max(-1)
    if not np.isfinite(top).all():
        return np.where(np.isfinite(top), 0, np.inf)
    if top.max(initial=0) < 40:
        return np.log1p(np.einsum("ij,ij->i", p, np.expm1(d) - d).astype(np.float64))
    before = z.astype(np.float64)  # p itself is 0 in float32 where such a change may put all of the probability
    return np.asarray(logsumexp(before + d, -1) - logsumexp(before, -1), np.float64)


def _rows(z: Array) -> Floats:
    array = np.asarray(z, np.float32)
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(-1, 1)
