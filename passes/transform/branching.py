"""Which sites can have a low-rank branch, what it may store, and putting it beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.formats.base import Floats
from qcompiler.graph.branches import add_branch
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.passes.transform.factors import FactorBits, Factors, Rounding
from qcompiler.pipeline import Pass
from qcompiler.plan import SitePlan

BITS: FactorBits = 16  # of a stored number of factors, if nothing else is asked for
_STEP = 32  # of the step that goes with each direction of factors in int8


@dataclass(frozen=True, eq=False)
class Readers:
    """Sites that read one value and share the first product of their branch; their weights lie one upon the other.

    Attributes:
        value: what they read.
        sites: in topological order.
        plans: of each of them, with a weight format and the same activation.
    """

    value: ir.Value
    sites: tuple[Site, ...]
    plans: tuple[SitePlan, ...]

    @property
    def name(self) -> str:
        """Of the value."""
        return self.value.name or "?"

    @property
    def rows(self) -> int:
        """Of all weights."""
        return sum(site.rows for site in self.sites)

    @property
    def columns(self) -> int:
        """Of each weight."""
        return self.sites[0].columns

    @property
    def rounding(self) -> Rounding:
        """How they are rounded."""
        pairs = zip(self.sites, self.plans, strict=True)
        return Rounding([(site.rows, plan.weight) for site, plan in pairs if plan.weight is not None])

    def matrix(self) -> Floats:
        """All weights, float32 [rows, columns]."""
        return np.concatenate([site.matrix() for site in self.sites])

    def split(self, matrix: Floats) -> list[Floats]:
        """Rows of a matrix, site by site."""
        return np.split(matrix, np.cumsum([site.rows for site in self.sites])[:-1])

    def rank(self, most: int, share: float, bits: FactorBits = BITS) -> int | Refusal:
        """The rank of a branch of numbers of so many bits: at most `most`, storing at most `share` bits per weight.

        Returns:
            A rank, or why there is none.
        """
        count = self.rows * self.columns
        each = bits * (self.rows + self.columns) + (0 if bits == BITS else _STEP)
        rank = min(most, int(share * count / each))
        if rank < 1:
            return Refusal(self.name, f"no branch: one of rank 1 stores more than {share:g} bits per weight")
        if rank >= min(self.rows, self.columns):
            return Refusal(self.name, f"no branch: one of rank {rank} is no smaller than the weights")
        return rank


def readers(plans: Mapping[Site, SitePlan], *, share: bool = True) -> tuple[list[Readers], list[Refusal]]:
    """The sites that can have a branch, those that read one value together, and why the others have none.

    Args:
        plans: sites in topological order with their plans, which have a weight format.
        share: whether sites that read one value are together.
    """
    refused: list[Refusal] = []
    found: dict[object, list[Site]] = {}
    for site, plan in plans.items():
        reason = unfit(site) or _unfit_numbers(site)
        if reason is None:
            like = (site.activation, site.columns, site.weight.dtype, replace(plan, weight=None, variant=""))
            found.setdefault(like if share else site, []).append(site)
        else:
            refused.append(Refusal(site.name, f"no branch: {reason}"))
    groups: list[Readers] = []
    for sites in found.values():
        assert sites[0].activation is not None
        groups.append(Readers(sites[0].activation, tuple(sites), tuple(plans[site] for site in sites)))
    return groups, refused


def unfit(site: Site) -> str | None:
    """Why a site can have no branch, as its operation is."""
    if site.op not in ("MatMul", "Gemm") or len(site.shape) != 2:
        return "only products with one matrix have them"
    if len(site.users) > 1:
        return "several operations read the weight"
    if site.branch:
        return "it has one"
    numbers = (site.node.attributes.get(name) for name in ("alpha", "beta"))
    if any(a is not None and a.as_float() != 1 for a in numbers):
        return "its Gemm multiplies by a number"
    return None


def _unfit_numbers(site: Site) -> str | None:
    matrix = site.matrix()
    if not np.isfinite(matrix).all():
        return "its weight holds NaN or infinity"
    return None if matrix.any() else "its weight is zero"


def put_beside(model: Model, group: Readers, factors: Factors) -> dict[str, dict[str, int]]:
    """Take the product of the factors from the weights, and put the branch beside them.

    Returns:
        By name of a site the rank of its branch, and the bytes stored with it (the shared factor with the first).
    """
    dtype = np.float16 if factors.steps is None else np.int8
    lefts = [left.astype(dtype) for left in group.split(factors.left)]
    codes = factors.right if factors.steps is None else np.rint(factors.right / factors.steps[:, None])
    right = codes.astype(dtype)
    add_branch(model.ir, group.sites, lefts, right, factors.steps)
    shared = right.nbytes + (0 if factors.steps is None else factors.steps.nbytes)
    sizes = [left.nbytes + (0 if number else shared) for number, left in enumerate(lefts)]
    return {site.name: {"rank": len(right), "bytes": size} for site, size in zip(group.sites, sizes, strict=True)}


def check_factors(item: Pass, bits: int) -> None:
    """Raise BadOption for an option `factor_bits` of a pass that there is no form for."""
    if bits not in (8, 16):
        where = f"pass '{item.registered_name()}'"
        raise BadOption(f"there are no factors of {bits} bits", where, "use factor_bits = 8 or 16")
