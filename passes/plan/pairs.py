"""SliM-LLM's constraint: in every matrix as many columns at one bit more than the common width as at one less.

The columns of a matrix lie in panels (`split-panels`), which are units of their own. Columns up minus columns down
are a resource of the matrix, with a budget of 0 in both directions; so each matrix has the common width on average.
Each matrix brings two budgets: too many prices for a Lagrangian search, so the integer program goes alone.

Source: SliM-LLM (2405.14917), which picks the number of pairs by search, one matrix after the other, for a given
order of the groups; the program picks panels of all matrices at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.panels import find_cuts
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Menu
from qcompiler.plan import SitePlan
from qcompiler.solvers.problem import Problem

SECONDS = 60.0  # of the integer program; 200 matrices of 3 panels take 4, of 12 panels 20


@dataclass(frozen=True)
class Pairs:
    """Which sites are panels of one matrix, and what they may have.

    Attributes:
        width: bits that every matrix has on average; 0: no constraint.
        matrices: names of the panels of each matrix.
    """

    width: int = 0
    matrices: tuple[tuple[str, ...], ...] = ()

    @staticmethod
    def of(model: Model, sites: Sequence[Site], width: int) -> Pairs:
        """The constraint on a model.

        Raises:
            PassRefused: no matrix is cut into panels.
        """
        if not width:
            return Pairs()
        cuts = find_cuts(model.graph, sites)
        if not cuts:
            raise PassRefused("no matrix lies in panels, so there are no pairs", "allocate", "run 'split-panels' first")
        return Pairs(width, tuple(tuple(site.name for site in cut.sum.sites) for cut in cuts))

    def narrowed(self, m: Menu) -> Menu:
        """The menu with the options of three widths, if it is one of a panel.

        Raises:
            BadOption: the common width is not among them.
        """
        if not any(m.site.name in names for names in self.matrices):
            return m
        plans = tuple(plan for plan in m.plans if abs(_bits(plan) - self.width) <= 1)
        if not any(_bits(plan) == self.width for plan in plans):
            raise BadOption(f"'{m.site.name}' has no option of {self.width} bits", "allocate: pairs", "add it to bits")
        return replace(m, plans=plans)

    def held(self, problem: Problem, menus: Sequence[Menu]) -> Problem:
        """The problem with the budgets of the matrices; without terms between units, as integer programs need it.

        Args:
            problem: whose units are the menus'.
            menus: narrowed.
        """
        if not self.width:
            return problem
        unit = {m.site.name: number for number, m in enumerate(menus)}
        costs, budgets = dict(problem.costs), dict(problem.budgets)
        for names in self.matrices:
            cost = np.zeros(problem.loss.shape)
            for number in (unit[name] for name in names if name in unit):
                m = menus[number]
                cost[number, : len(m.plans)] = [m.site.columns * (_bits(plan) - self.width) for plan in m.plans]
            for direction, sign in (("up", 1), ("down", -1)):
                costs[f"{names[0]} {direction}"] = sign * cost
                budgets[f"{names[0]} {direction}"] = 0.0
        return replace(problem, costs=costs, budgets=budgets, cross=None)


def _bits(plan: SitePlan) -> int:
    assert plan.weight is not None
    return plan.weight.bits
