"""Problems with terms between units, in the one form that their solvers share.

    minimise  sum_u unary[u, x_u] + sum_{u<v} pair[u, x_u, v, x_v]
    subject to the same expression for every budgeted resource being at most its budget

Terms within a unit are part of `unary`: only one option of a unit is chosen, so whatever else a measured matrix
holds there never counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.problem import Choice, Floats, InfeasibleProblem, Problem, without_ties

MOST_OPTIONS = 8192  # of all units together: the dense matrix of pair terms holds the square of that


@dataclass(frozen=True, eq=False)
class Terms:
    """Unary and pair terms of one quantity (the loss, or a resource).

    Attributes:
        unary: float64 [units, options]; inf where a unit has no such option.
        pair: float64 [units, options, units, options], symmetric, zero within units and at missing options; or None.
    """

    unary: Floats
    pair: Floats | None

    def of(self, choice: Choice) -> float:
        """The sum for a choice [units]."""
        index = np.arange(len(choice))
        own = math.fsum(self.unary[index, choice])
        return own if self.pair is None else own + 0.5 * float(self.pair[index, choice][:, index, choice].sum())

    def field(self, choice: Choice) -> Floats:
        """What every option [units, options] would add, given the choices of all other units."""
        if self.pair is None:
            return self.unary
        return self.unary + self.pair[np.arange(len(choice)), choice].sum(axis=0)


@dataclass(frozen=True, eq=False)
class PairProblem:
    """A problem without ties as terms.

    Attributes:
        problem: what this was made of, ties merged.
        members: int [units of the original], the unit that each became.
        loss: its terms.
        resources: terms of every budgeted resource; cost 0 at missing options.
        budgets: float64 [resources].
        allowed: bool [units, options].
        within: float64 [units, options, options], what the matrix of the loss holds within units, or None: of no
            consequence for any choice, but a form that is convex with it can be convex only with it.
    """

    problem: Problem
    members: Choice
    loss: Terms
    resources: tuple[Terms, ...]
    budgets: Floats
    allowed: npt.NDArray[np.bool_]
    within: Floats | None = None

    @staticmethod
    def of(problem: Problem) -> PairProblem:
        """Bring a problem into this form.

        Raises:
            ValueError: too many options for a dense matrix of pairs, or ties between units without a common option.
            InfeasibleProblem: a budget without pair costs is below the cheapest options.
        """
        if problem.loss.size > MOST_OPTIONS and not problem.separable:
            raise ValueError(
                f"{problem.loss.size} options are too many for terms between units; at most {MOST_OPTIONS}: "
                "drop options, or take larger units (blocks instead of layers)"
            )
        merged, members = without_ties(problem)
        least = merged.least_costs()
        if any(least[name] > merged.budgets[name] for name in merged.budgets if name not in merged.pair_costs):
            raise InfeasibleProblem(least, merged.budgets)
        allowed = merged.allowed
        resources = [_terms(merged.costs[n], merged.pair_costs.get(n), allowed, 0.0) for n in merged.budgets]
        return PairProblem(
            merged, members, _terms(merged.loss, merged.cross, allowed, np.inf), tuple(resources),
            np.array(list(merged.budgets.values()), np.float64), allowed, _within(merged),
        )  # fmt: skip

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.allowed)

    def priced(self, prices: Floats) -> Terms:
        """Loss plus prices [resources] times costs (budgets not subtracted)."""
        unary, pair = self.loss.unary.copy(), self.loss.pair
        for price, terms in zip(prices, self.resources, strict=True):
            unary += price * terms.unary
            if terms.pair is not None and price > 0:
                pair = price * terms.pair if pair is None else pair + price * terms.pair
        return Terms(unary, pair)


def _within(problem: Problem) -> Floats | None:
    if not isinstance(problem.cross, np.ndarray):
        return None
    units, options = problem.loss.shape
    index = np.arange(units)
    blocks = problem.cross.reshape(units, options, units, options)[index, :, index, :].copy()
    blocks[:, np.arange(options), np.arange(options)] = 0
    return blocks if blocks.any() else None


def _terms(own: Floats, matrix: Any, allowed: npt.NDArray[np.bool_], missing: float) -> Terms:
    unary = own.copy()
    if matrix is None:
        return Terms(np.where(allowed, unary, missing), None)
    units, options = own.shape
    dense = np.array(matrix if isinstance(matrix, np.ndarray) else matrix.toarray(), np.float64)
    unary += 0.5 * dense.diagonal().reshape(units, options)
    gone = ~allowed.ravel()
    dense[gone] = 0
    dense[:, gone] = 0
    pair = dense.reshape(units, options, units, options)
    index = np.arange(units)
    pair[index, :, index, :] = 0
    return Terms(np.where(allowed, unary, missing), 0.5 * (pair + pair.transpose(2, 3, 0, 1)))
