"""GPTQ: codes that minimise the error of each site's output on calibration data, block by block.

Each site sees what the rounded part before it really yields, and is rounded towards what the float model would
have made of its own input: a share `follow` of the error that has come down is corrected by the weights before
they are rounded (all of it would fit the noise; half measured best). Products that are added up (the panels of a
matrix) make up for each other's errors: they are rounded as one matrix with a format for each part.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import PerChannel, PerGroup, Promoted, QTensor, QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import Method, encode, fit, quantize
from qcompiler.formats.scales import free_magnitude, magnitude, scaled
from qcompiler.graph.panels import find_sums
from qcompiler.graph.sites import Site
from qcompiler.measure.decoded import decoded_weight
from qcompiler.measure.segments import Segment
from qcompiler.model import Model
from qcompiler.passes.round.gptq_core import Factor, Order, factorize, gptq_round, hessian_loss
from qcompiler.passes.round.products import Product, by_input, decoded, noise, places, rows_of
from qcompiler.passes.round.refine import refine
from qcompiler.passes.round.rows import block_count
from qcompiler.passes.round.streams import Streams, calibration_feeds
from qcompiler.pipeline import Pass, PassReport
from qcompiler.progress import Progress
from qcompiler.scratch import empty

Array = npt.NDArray[Any]
_LEAST_ROWS = 1 << 12  # of all samples together, for a Gram matrix
_ROWS_PER_COLUMN = 16
_PART = 1 << 24  # weights that are rounded at a time


@dataclass(frozen=True)
class GPTQ(Pass):
    """Round the weights of all planned sites, each towards the smallest error of its own output.

    Attributes:
        damping: share of the mean diagonal that is added to each Hessian; ten times as much as long as it has no
            Cholesky factor.
        order: columns in order of falling input power ("diagonal", the paper's act-order), or as they are ("natural").
            Scales of groups are fixed before that, so codes go back to their places and no group index is stored.
        sequential: whether a site sees the rounded sites before it ("true sequential"), or the float model.
        follow: share of the error of its input that a site's target makes up for (sequential only).
        sweeps: of descent over codes and scales after GPTQ (see `refine`).
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        clipping: the scales to begin with: "mse", "minmax" or "hqq".
    """

    makes_codes: ClassVar[bool] = True
    damping: float = 0.05
    order: Order = "diagonal"
    sequential: bool = True
    follow: float = 0.5
    sweeps: int = 3
    samples: int = 64
    tokens: int = 8192
    clipping: Method = "mse"

    def __post_init__(self) -> None:
        name = self.registered_name()
        if not 0 <= self.damping < math.inf:
            raise BadOption(f"damping {self.damping:g} is no share of the mean diagonal", name, "0.01 to 0.1 is usual")
        if not 0 <= self.follow <= 1:
            raise BadOption(f"follow {self.follow:g} is no share of the error", name, "give a number from 0 to 1")
        if self.sweeps < 0 or self.samples < 1 or self.tokens < 1:
            what = f"{self.sweeps} sweeps, {self.samples} samples, {self.tokens} tokens"
            raise BadOption(what, name, "sweeps are 0 or more, samples and tokens at least 1")

    def requires(self, model: Model) -> None:
        """Refuse a model without calibration data, or one that is lowered."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if model.calibration is None:
            what = f"{self.registered_name()} needs calibration data"
            raise PassRefused(what, where=model.name, fix="give data, or use 'nearest'")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights`; metrics hold the relative squared output error of each site, and of nearest.

        Sites whose products are added up share one output, and so one error.
        """
        streams = Streams(model, calibration_feeds(model, self.samples, self.tokens))
        rng = np.random.default_rng(0)
        errors: dict[str, dict[str, float]] = {}
        sums = [found.sites for found in find_sums(model.graph, streams.segments.sites)]
        for segment in progress.track(list(streams.segments), "Rounding"):
            for products in by_input(segment, model, sums):
                if products[0][0].activation is None:
                    self._round_tables(model, streams, products)
                else:
                    errors |= self._round_together(model, streams, segment, products, rng)
            streams.advance(segment)
        changed = len([n for n, p in model.plan.sites.items() if p.weight is not None and n in model.weights])
        return PassReport(self.registered_name(), changed, metrics={"relative_error": errors})

    def _round_tables(self, model: Model, streams: Streams, tables: Sequence[Product]) -> None:
        for (site,) in tables:
            self._keep(model, streams, site, quantize(site.matrix(), _spec(model, site), self.clipping))

    def _keep(self, model: Model, streams: Streams, site: Site, tensor: QTensor) -> None:
        model.weights[site.name] = tensor
        if self.sequential and streams.is_read_behind(site):
            streams.replace(site, decoded_weight(site, tensor))

    def _round_together(
        self,
        model: Model,
        streams: Streams,
        segment: Segment,
        products: Sequence[Product],
        rng: np.random.Generator,
    ) -> dict[str, dict[str, float]]:
        """Round products that read the same values in the same way: they share Hessian and factor."""
        with _overflow_refused(products[0]):
            gram, cross = self._grams(streams, segment, products[0], rng)
            if not np.isfinite(gram).all() or (cross is not None and not np.isfinite(cross).all()):
                raise FloatingPointError
        factors: dict[tuple[int, ...], Factor] = {}
        errors: dict[str, dict[str, float]] = {}
        for product in products:
            specs = [_spec(model, site) for site in product]
            finer = tuple(spec.bits - min(s.bits for s in specs) for spec in specs)
            if finer not in factors:
                factors[finer] = factorize(gram, self.damping, self.order, noise(product, finer))
            factor = factors[finer]
            with _overflow_refused(product):
                unit = _unit(product, specs)
                tensors, error = self._round_product(product, unit, cross, specs, factor)
            for site, tensor in zip(product, tensors, strict=True):
                errors[site.name] = error
                self._keep(model, streams, site, scaled(tensor, unit))
        return errors

    def _round_product(
        self,
        product: Product,
        unit: np.float32,
        cross: Floats | None,
        specs: Sequence[QuantSpec],
        factor: Factor,
    ) -> tuple[list[QTensor], dict[str, float]]:
        """The better of GPTQ and nearest, in parts of rows; their errors relative to the power of the output.

        Weights are read, and divided by `unit`, part by part: a table of all tokens may be larger than what is free.
        """
        parts: list[list[QTensor]] = []
        found, plain, power = 0.0, 0.0, 0.0
        views = [site.to_matrix(site.array()) for site in product]
        shape = (views[0].shape[0], sum(view.shape[1] for view in views))
        for rows in _row_parts(shape, specs, factor):
            part = np.concatenate([np.asarray(view[rows], np.float32) for view in views], 1) / unit
            target = part if cross is None else _followed(part, cross * np.float32(self.follow), factor)
            rounded, losses = self._round_rows(target, product, specs, factor)
            parts.append(rounded)
            found, plain, power = found + min(losses[:2]), plain + losses[1], power + losses[2]
        power = power or 1.0
        return _stacked(parts), {"error": found / power, "nearest": plain / power}

    def _round_rows(
        self, target: Floats, product: Product, specs: Sequence[QuantSpec], factor: Factor
    ) -> tuple[list[QTensor], tuple[float, float, float]]:
        """The better of GPTQ and nearest; the errors of both, and the power of the output."""
        diagonal = np.einsum("bii->bi", factor.hessian)
        importance = np.repeat(diagonal, target.shape[0] // len(diagonal), 0)
        nearest: list[QTensor] = []
        for columns, spec in zip(places(product), specs, strict=True):
            part = np.ascontiguousarray(target[:, columns])
            nearest.append(encode(part, spec, *fit(part, spec, self.clipping, importance[:, columns])))
        found = self.improve(target, factor, gptq_round(target, factor, nearest))
        power = float(hessian_loss(target, factor.hessian).sum())
        losses = [float(hessian_loss(decoded(q) - target, factor.hessian).sum()) for q in (found, nearest)]
        if not np.isfinite((power, *losses)).all():
            raise FloatingPointError
        return found if losses[0] <= losses[1] else nearest, (losses[0], losses[1], power)

    def improve(self, target: Floats, factor: Factor, start: Sequence[QTensor]) -> list[QTensor]:
        """What follows GPTQ: better codes and scales for a matrix [rows, columns], in the panels of `start`."""
        return refine(target, factor.hessian, start, self.sweeps)

    def _grams(
        self, streams: Streams, segment: Segment, product: Product, rng: np.random.Generator
    ) -> tuple[Floats, Floats | None]:
        """Mean of x x^T, and of (exact - x) x^T if the error is to be followed: [blocks, columns, columns].

        Over all that multiplies the weight. Both in units of the inputs' magnitude, which changes no code: squares of
        large inputs would overflow.
        """
        follow = self.sequential and self.follow > 0
        columns = sum(site.columns for site in product)
        limit = -(-max(_LEAST_ROWS, _ROWS_PER_COLUMN * columns) // len(streams.rounded))
        gram = np.zeros((block_count(product[0]), columns, columns), np.float32)
        cross: Floats | None = np.zeros_like(gram) if follow else None
        count, unit = 0, np.float32(0)
        for seen in zip(*(streams.inputs(segment, site) for site in product), strict=True):
            users, rounded, exact = zip(*seen, strict=True)
            state = rng.bit_generator.state
            x = rows_of(product, users, rounded if self.sequential else exact, limit, rng)
            unit = unit or magnitude(x)
            x = x / unit
            gram += x.transpose(0, 2, 1) @ x
            count += x.shape[1]
            if cross is not None and any(y is not x for _, x, y in seen):
                rng.bit_generator.state = state  # the same positions of both
                y = rows_of(product, users, exact, limit, rng) / unit
                cross += (y - x).transpose(0, 2, 1) @ x
        mean = np.float32(1 / max(count, 1))
        return gram * mean, None if cross is None else np.asarray(cross * mean, np.float32)


def _unit(product: Product, specs: Sequence[QuantSpec]) -> np.float32:
    """The `free_magnitude` of matrices side by side."""
    halves = [spec for spec in specs if spec.scale_dtype == "float16"]
    return max(free_magnitude(site.array(), (halves or specs)[0]) for site in product)


def _row_parts(shape: tuple[int, ...], specs: Sequence[QuantSpec], factor: Factor) -> list[slice]:
    """Rows to be rounded at a time: a dozen arrays of their size are alive then.

    All of them where they share more than the Hessian: scales, a Hessian for each block, or a share of wide groups.
    """
    apart = all(isinstance(s.granularity, PerChannel | PerGroup) and not isinstance(s.format, Promoted) for s in specs)
    step = max(1, _PART // shape[1]) if apart and len(factor.order) == 1 else shape[0]
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def _stacked(parts: Sequence[Sequence[QTensor]]) -> list[QTensor]:
    """Panels whose rows were rounded in parts, as one each."""
    if len(parts) == 1:
        return list(parts[0])
    panels: list[QTensor] = []
    for panel in zip(*parts, strict=True):
        zeros = [part.zero for part in panel if part.zero is not None]
        codes = empty((sum(part.shape[0] for part in panel), panel[0].shape[1]), panel[0].codes.dtype)
        np.concatenate([part.codes for part in panel], out=codes)
        scale = np.concatenate([part.scale for part in panel])
        panels.append(QTensor(panel[0].spec, codes, scale, np.concatenate(zeros) if zeros else None))
    return panels


@contextmanager
def _overflow_refused(product: Product) -> Generator[None]:
    """Where numbers leave float32, say at which layer. What BLAS's threads let pass is seen in what comes out."""
    try:
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            yield
    except FloatingPointError as error:
        what = "its weights, or its inputs on this data, are too large for float32 arithmetic"
        raise PassRefused(what, product[0].name, "repair the weights or the data, or keep it float: --keep") from error


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
