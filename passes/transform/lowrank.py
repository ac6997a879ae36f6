"""A low-rank correction beside a rounded weight, as an option of allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from scipy.sparse.linalg import LinearOperator, eigsh

from qcompiler.errors import PassRefused, Refusal
from qcompiler.formats import QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import encode, fit
from qcompiler.formats.varied import Undo
from qcompiler.graph.branches import add_branch
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.gram import Gram, gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.progress import Progress
from qcompiler.variants import Offer

_BITS = 16  # of a stored number
_SHARE = 8  # one bit for so many weights is what a correction may store
_FITS = 3  # of scales to what is left
_REPEATS = 5  # of rounding with these scales
Factors = tuple[Floats, Floats]


@dataclass(frozen=True, eq=False)
class Correction:
    """The effect on one site: W becomes Q(W - U V) + U V.

    Attributes:
        rank: columns of U and rows of V.
        factors: for each format U float32 [rows, rank] and V [rank, columns], numbers of float16.
        original: the weight that they correct.
    """

    rank: int
    factors: Mapping[QuantSpec, Factors]
    original: ir.TensorProtocol

    def change(self, matrix: Floats, spec: QuantSpec) -> tuple[Floats, Undo]:
        """See `Effect`; `matrix` is the whole weight."""
        left, right = self.factors[spec]
        product = (left @ right).astype(np.float32)
        return matrix - product, lambda rounded: rounded + product

    def extra_bits(self, rows: int, columns: int) -> int:
        """U and V in float16."""
        return self.rank * (rows + columns) * _BITS


@dataclass
class LowRank:
    """Two small products beside a product: what rounding loses in the few directions that matter most.

    U V is what the rounding error has in the directions in which it changes the output most (the largest eigenvectors
    of E H E^T, where H is the second moment of the input); the rest of the weight is rounded again. The rank is such
    that U and V store about an eighth of a bit per weight.

    Source: Yao et al., LoRC in ZeroQuant-V2 (2303.08302), weighted by the input as in QERA (2410.06040).
    """

    free: bool = False
    _offered: dict[str, Correction] = field(default_factory=dict[str, Correction])

    def offer(self, model: Model, formats: Mapping[Site, Sequence[QuantSpec]], progress: Progress) -> Offer:
        """See `Variant`. Refused: what is no plain product of one operation."""
        reasons = {site: _unfit(site) for site in formats}
        fit = [site for site, reason in reasons.items() if reason is None]
        for chunk in gram_parts(fit, lambda site: [site]):
            known = grams(model, chunk, enough_samples(model))
            for site in progress.track([site for site in chunk if site.name in known], "low-rank corrections"):
                self._offered[site.name] = _correction(site, formats[site], known[site.name])
        tokens = {name: f"r{effect.rank}" for name, effect in self._offered.items()}
        refused = tuple(Refusal(site.name, f"no correction: {reason}") for site, reason in reasons.items() if reason)
        return Offer(self._offered, tokens, (), refused)

    def commit(self, model: Model, chosen: Mapping[str, QuantSpec]) -> None:
        """Put the two products behind each operation, and take them from its weight."""
        for site in [site for site in find_sites(model.ir) if site.name in chosen]:
            effect = self._offered[site.name]
            left, right = effect.factors[chosen[site.name]]
            scaled = left * _row_scales(site, effect.original)[:, None]
            with np.errstate(over="ignore"):
                stored = scaled.astype(np.float16), right.astype(np.float16)
            if not np.isfinite(stored[0]).all():
                raise PassRefused("the correction overflows float16", site.name, "leave out the variant 'lowrank'")
            add_branch(model.graph, site, *stored)


def _unfit(site: Site) -> str | None:
    """Why a site can have no correction."""
    if site.op not in ("MatMul", "Gemm") or len(site.shape) != 2:
        return "only products with one matrix have them"
    if len(site.users) > 1:
        return "several operations read the weight"
    if site.branch:
        return "it has one"
    numbers = (site.node.attributes.get(name) for name in ("alpha", "beta"))
    if any(a is not None and a.as_float() != 1 for a in numbers):
        return "its Gemm multiplies by a number"
    return None if site.rows > rank_of(site) + 1 else "it has too few rows"


def rank_of(site: Site) -> int:
    """The rank that stores about an eighth of a bit per weight, at least 1."""
    return max(1, round(site.count / (_SHARE * _BITS * (site.rows + site.columns))))


def _correction(site: Site, specs: Sequence[QuantSpec], gram: Gram) -> Correction:
    rank, matrix = rank_of(site), site.matrix()
    assert site.weight.const_value is not None
    return Correction(
        rank, {spec: _factors(matrix, spec, gram.matrix[0], rank) for spec in specs}, site.weight.const_value
    )


def _factors(matrix: Floats, spec: QuantSpec, moments: Floats, rank: int) -> Factors:
    """U and V for one format.

    W - U V is rounded anew, which makes an error anew, so U V is repeated until that changes little: for the same
    scales and V, the directions of the input that matter, then for the scales that fit, then for the V that fits.
    """
    left, right = np.zeros((len(matrix), rank), np.float32), np.zeros((rank, matrix.shape[1]), np.float32)
    for _ in range(_FITS):
        rest = _less(matrix, left @ right)
        scale, zero = fit(rest, spec, "mse")
        error = _less(matrix, encode(rest, spec, scale, zero).decode())
        right = _directions(error, moments, rank)
        weighted = moments @ right.T
        inverse = np.linalg.pinv(right @ weighted, rcond=1e-6, hermitian=True)
        for _ in range(_REPEATS):
            with np.errstate(over="ignore"):
                left = (error @ weighted @ inverse).astype(np.float16).astype(np.float32)
            if not np.isfinite(left).all():  # beyond float16
                return np.zeros_like(left), np.zeros_like(right)
            rest = _less(matrix, left @ right)
            error = _less(matrix, encode(rest, spec, scale, zero).decode())
    return left, right


def _less(matrix: Floats, other: Floats) -> Floats:
    return (matrix - other).astype(np.float32)


def _directions(error: Floats, moments: Floats, rank: int) -> Floats:
    """V float32 [rank, columns], numbers of float16: of U V that leaves the least E||x (error - U V)^T||^2.

    With u the largest eigenvectors of error moments error^T that is u^T error; its rows are scaled to a largest
    element of 1, for the range of float16.
    """

    def apply(vector: Floats) -> Floats:
        return (error @ (moments @ (error.T @ vector))).astype(np.float32)

    rows = len(error)
    start = np.random.default_rng(0).normal(size=rows).astype(np.float32)
    first = apply(start)
    if not (np.any(first) and np.isfinite(first).all()):
        return np.zeros((rank, error.shape[1]), np.float32)
    operator = LinearOperator((rows, rows), matvec=apply, dtype=np.float32)  # type: ignore[call-arg]
    _, vectors = eigsh(operator, k=rank, v0=start, tol=1e-3)  # type: ignore[arg-type]
    right = np.asarray(vectors, np.float32).T @ error
    reach = np.abs(right).max(1, keepdims=True)
    return np.divide(right, reach, out=np.zeros_like(right), where=reach > 0).astype(np.float16).astype(np.float32)


def _row_scales(site: Site, original: ir.TensorProtocol) -> Floats:
    """[rows]: by what scales of the value that the operation writes have multiplied its weight since the offer."""
    before = np.asarray(site.to_matrix(original.numpy()), np.float64)
    size = np.einsum("rc,rc->r", before, before)
    now = np.einsum("rc,rc->r", site.matrix(), before)
    scales: Floats = np.divide(now, size, out=np.ones_like(size), where=size > 0).astype(np.float32)
    return scales
