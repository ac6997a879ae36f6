"""GPTQ: codes that minimise the error of each site's output on calibration data, block by block.

Each site sees what the rounded part before it really yields, and is rounded towards what the float model would
have made of its own input: a share `follow` of the error that has come down is corrected by the weights before
they are rounded (all of it would fit the noise; half measured best).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.errors import PassRefused
from qcompiler.formats import QTensor, QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import Method, encode, fit, quantize
from qcompiler.formats.scales import free_magnitude, magnitude, scaled
from qcompiler.graph.sites import Site
from qcompiler.measure.segments import Segment
from qcompiler.model import Model
from qcompiler.passes.round.gptq_core import Factor, Order, factorize, gptq_round, hessian_loss
from qcompiler.passes.round.refine import refine
from qcompiler.passes.round.rows import block_count, input_rows
from qcompiler.passes.round.streams import Streams, calibration_feeds
from qcompiler.pipeline import Pass, PassReport
from qcompiler.progress import Progress

_LEAST_ROWS = 1 << 12  # of all samples together, for a Gram matrix
_ROWS_PER_COLUMN = 16


@dataclass(frozen=True)
class GPTQ(Pass):
    """Round the weights of all planned sites, each towards the smallest error of its own output.

    Attributes:
        damping: share of the mean diagonal that is added to each Hessian.
        order: columns in order of falling input power ("diagonal"), or as they are ("natural").
        sequential: whether a site sees the rounded sites before it, or the float model.
        follow: share of the error of its input that a site's target makes up for (sequential only).
        sweeps: of descent over codes and scales after GPTQ (see `refine`).
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        clipping: "mse" or "minmax" scales to begin with.
    """

    damping: float = 0.05
    order: Order = "diagonal"
    sequential: bool = True
    follow: float = 0.5
    sweeps: int = 3
    samples: int = 64
    tokens: int = 8192
    clipping: Method = "mse"

    def requires(self, model: Model) -> None:
        """Refuse a model without calibration data, or one that is lowered."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if model.calibration is None:
            raise PassRefused("GPTQ needs calibration data", where=model.name, fix="give data, or use 'nearest'")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights`; metrics hold the relative squared output error of each site, and of nearest."""
        streams = Streams(model, calibration_feeds(model, self.samples, self.tokens))
        rng = np.random.default_rng(0)
        errors: dict[str, dict[str, float]] = {}
        for segment in progress.track(list(streams.segments), "Rounding"):
            for sites in _by_input(segment, model):
                if sites[0].activation is None:
                    self._round_tables(model, streams, sites)
                else:
                    errors |= self._round_together(model, streams, segment, sites, rng)
            streams.advance(segment)
        changed = len([n for n, p in model.plan.sites.items() if p.weight is not None and n in model.weights])
        return PassReport(self.registered_name(), changed, metrics={"relative_error": errors})

    def _round_tables(self, model: Model, streams: Streams, sites: list[Site]) -> None:
        for site in sites:
            self._keep(model, streams, site, quantize(site.matrix(), _spec(model, site), self.clipping))

    def _keep(self, model: Model, streams: Streams, site: Site, tensor: QTensor) -> None:
        model.weights[site.name] = tensor
        if self.sequential:
            streams.replace(site, site.from_matrix(tensor.decode()))

    def _round_together(
        self, model: Model, streams: Streams, segment: Segment, sites: list[Site], rng: np.random.Generator
    ) -> dict[str, dict[str, float]]:
        """Round sites that read the same value in the same way: they share Hessian and factor."""
        with _overflow_refused(sites[0]):
            gram, cross = self._grams(streams, segment, sites[0], rng)
            if not np.isfinite(gram).all() or (cross is not None and not np.isfinite(cross).all()):
                raise FloatingPointError
        factor = factorize(gram, self.damping, self.order)
        errors: dict[str, dict[str, float]] = {}
        for site in sites:
            matrix, spec = site.matrix(), _spec(model, site)
            with _overflow_refused(site):
                unit = free_magnitude(matrix, spec)
                matrix = matrix / unit
                target = matrix if cross is None else _followed(matrix, cross * np.float32(self.follow), factor)
                tensor, errors[site.name] = self._round_site(target, spec, factor)
            self._keep(model, streams, site, scaled(tensor, unit))
        return errors

    def _round_site(self, target: Floats, spec: QuantSpec, factor: Factor) -> tuple[QTensor, dict[str, float]]:
        """The better of GPTQ and nearest; their errors relative to the power of the output."""
        diagonal = np.einsum("bii->bi", factor.hessian)
        importance = np.repeat(diagonal, target.shape[0] // len(diagonal), 0)
        scale, zero = fit(target, spec, self.clipping, importance)
        nearest = encode(target, spec, scale, zero)
        found = QTensor(spec, gptq_round(target, factor, spec, scale, zero), scale, zero)
        found = refine(target, factor.hessian, found, self.sweeps)
        power = float(hessian_loss(target, factor.hessian).sum()) or 1.0
        losses = [float(hessian_loss(q.decode() - target, factor.hessian).sum()) / power for q in (found, nearest)]
        best = found if losses[0] <= losses[1] else nearest
        if not np.isfinite((power, *losses)).all():
            raise FloatingPointError
        return best, {"error": min(losses), "nearest": losses[1]}

    def _grams(
        self, streams: Streams, segment: Segment, site: Site, rng: np.random.Generator
    ) -> tuple[Floats, Floats | None]:
        """Mean of x x^T, and of (exact - x) x^T if the error is to be followed: [blocks, columns, columns].

        Both in units of the inputs' magnitude, which changes no code: squares of large inputs would overflow.
        """
        follow = self.sequential and self.follow > 0
        limit = -(-max(_LEAST_ROWS, _ROWS_PER_COLUMN * site.columns) // len(streams.rounded))
        gram = np.zeros((block_count(site), site.columns, site.columns), np.float32)
        cross: Floats | None = np.zeros_like(gram) if follow else None
        count, unit = 0, np.float32(0)
        for rounded, exact in streams.inputs(segment, site):
            state = rng.bit_generator.state
            x = input_rows(site, rounded if self.sequential else exact, limit, rng).transpose(1, 0, 2)
            unit = unit or magnitude(x)
            x = x / unit
            gram += x.transpose(0, 2, 1) @ x
            count += x.shape[1]
            if cross is not None and exact is not rounded:
                rng.bit_generator.state = state  # the same positions of both
                y = input_rows(site, exact, limit, rng).transpose(1, 0, 2) / unit
                cross += (y - x).transpose(0, 2, 1) @ x
        mean = np.float32(1 / max(count, 1))
        return gram * mean, None if cross is None else np.asarray(cross * mean, np.float32)


def _by_input(segment: Segment, model: Model) -> list[list[Site]]:
    """The segment's planned sites; those that read one value in the same way are together."""
    groups: dict[object, list[Site]] = {}
    for site in segment.sites:
        plan = model.plan.sites.get(site.name)
        if plan is not None and plan.weight is not None:
            like = (site.activation, site.layout) if site.op in ("MatMul", "Gemm") and block_count(site) == 1 else site
            groups.setdefault(like if site.activation is not None else None, []).append(site)
    return list(groups.values())


@contextmanager
def _overflow_refused(site: Site) -> Generator[None]:
    """Where numbers leave float32, say at which layer. What BLAS's threads let pass is seen in what comes out."""
    try:
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            yield
    except FloatingPointError as error:
        what = "its weights, or its inputs on this data, are too large for float32 arithmetic"
        raise PassRefused(what, site.name, "repair the weights or the data, or keep it float: --keep") from error


def _spec(model: Model, site: Site) -> QuantSpec:
    spec = model.plan.sites[site.name].weight
    assert spec is not None
    return spec


def _followed(matrix: Floats, cross: npt.NDArray[np.float32], factor: Factor) -> Floats:
    """The weights that turn the rounded input best into what the float model makes of the exact one."""
    blocks, columns = factor.order.shape
    wide = matrix.reshape(blocks, -1, columns) @ cross
    index = np.broadcast_to(factor.order[:, None, :], wide.shape)
    ordered = np.take_along_axis(wide, index, 2) @ factor.upper.transpose(0, 2, 1) @ factor.upper
    change = np.empty_like(wide)
    np.put_along_axis(change, index, ordered, 2)
    return np.asarray(matrix + change.reshape(matrix.shape), np.float32)
