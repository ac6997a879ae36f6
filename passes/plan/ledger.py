"""From menus and budgets to a solver's problem, in exact integers, and back to words when nothing fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from qcompiler.budget import GRID_BYTES, Budget, bits_per_weight, other_bytes, site_bits, stored_bytes, weight_bits
from qcompiler.errors import BudgetInfeasible, ContractViolated
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.overrun import size_text
from qcompiler.passes.plan.candidates import Menu
from qcompiler.passes.round.quantized_values import choose_values
from qcompiler.solvers.problem import Problem, separable


@dataclass(frozen=True)
class Priced:
    """What the options cost of something that is not stored: seconds, bit operations.

    Attributes:
        costs: per menu and option.
        fixed: what the rest of the model costs, whatever is decided.
    """

    costs: Sequence[Sequence[float]]
    fixed: float = 0.0


@dataclass(frozen=True)
class Ledger:
    """What is to be decided, and what is stored whatever is decided.

    Attributes:
        menus: of the sites that have options.
        weights: number of weights in the average: all sites that are not kept.
        fixed_bits: stored bits of weights in the average that stay float.
        fixed_bytes: everything else that is stored: those weights, kept sites, all other constants.
        floats: (site, bytes) of the weights in the average that stay float.
        others: (what, bytes) of the rest of the fixed part.
        priced: what options cost of other resources, by `Budget.resource`; needed for budgets that are not `stored`.
    """

    menus: tuple[Menu, ...]
    weights: int
    fixed_bits: int
    fixed_bytes: int
    floats: tuple[tuple[str, int], ...]
    others: tuple[tuple[str, int], ...]
    priced: Mapping[str, Priced] = field(default_factory=dict[str, Priced])

    @staticmethod
    def of(model: Model, sites: Sequence[Site], menus: Sequence[Menu], kept: Sequence[str]) -> Ledger:
        """Sort all that the model stores; `menus` are those of the sites that are not kept.

        Where options have static activations, the grids that they will need are counted as if all were chosen.
        """
        floats = [m.site for m in menus if not m.plans]
        reasons = {m.site.name: m.refused[-1].reason if m.refused else "float" for m in menus}
        held = [site for site in sites if site.name in kept]
        left = [(f"{s.name} ({reasons[s.name]})", site_bits(s, None) // 8) for s in floats]
        others = [(f"{s.name} (kept)", site_bits(s, None) // 8) for s in held]
        others.append(("constants that are no weights", other_bytes(model, sites)))
        others.append(("grids of static activations", GRID_BYTES * _grids(model, menus)))
        return Ledger(
            tuple(m for m in menus if m.plans),
            sum(m.site.count for m in menus),
            sum(site_bits(site, None) for site in floats),
            sum(size for _, size in (*left, *others)),
            tuple(left),
            tuple(others),
        )

    def with_prices(self, priced: Mapping[str, Priced]) -> Ledger:
        """The same with costs of further resources, which replace those known of the same resources."""
        return replace(self, priced={**self.priced, **priced})

    def costs(self) -> dict[str, list[list[float]]]:
        """Costs of every option in all resources; exact for bits and bytes."""
        bits = [m.bits() for m in self.menus]
        return {
            "bits": [[float(b) for b in row] for row in bits],
            "bytes": [[float(-(-b // 8)) for b in row] for row in bits],
            **{name: [list(row) for row in priced.costs] for name, priced in self.priced.items()},
        }

    def fixed(self, budget: Budget) -> float:
        """What is spent whatever is decided."""
        if not budget.stored:
            return self.priced[budget.resource].fixed
        return float(self.fixed_bits if budget.kind == "bits" else self.fixed_bytes)

    def room(self, budgets: Sequence[Budget]) -> dict[str, float]:
        """What the budgets leave for the options, the tightest of each resource; whole bits and bytes."""
        room: dict[str, float] = {}
        for budget in budgets:
            name = budget.resource
            room[name] = min(room.get(name, math.inf), self._left(budget))
        return room

    def _left(self, budget: Budget) -> float:
        if not budget.stored:
            return float(budget.amount) - self.priced[budget.resource].fixed
        if budget.kind == "bits":
            left = math.floor(budget.amount * self.weights) - self.fixed_bits
        else:
            left = math.floor(budget.amount) - self.fixed_bytes
        # No budget needs more room than the dearest options take; floats stay exact below 2^53.
        return float(min(left, 2**52))

    def average(self, bits: float) -> float:
        """Bits per weight when the options take `bits`."""
        return (bits + self.fixed_bits) / self.weights if self.weights else 0.0

    def problem(
        self, losses: Sequence[Sequence[float]], budgets: Sequence[Budget], ties: Sequence[tuple[int, ...]]
    ) -> Problem:
        """The problem for a solver; losses per menu and option."""
        return Problem.ragged(losses, self.costs(), self.room(budgets), tuple(ties))

    def require_feasible(self, budgets: Sequence[Budget], ties: Sequence[tuple[int, ...]]) -> None:
        """Raise BudgetInfeasible, with the smallest feasible budgets, if the cheapest options do not fit one."""
        blank = [[0.0] * len(m.plans) for m in self.menus]
        least = separable(self.problem(blank, budgets, ties))[0].least_costs()
        asked = tightest(budgets)
        over = [budget for budget in asked if least[budget.resource] > self._left(budget)]
        if over:
            named = f"budget {over[0]}" if len(over) == 1 else f"budgets {' and '.join(map(str, over))}"
            smallest = " and ".join(self.show(budget, least[budget.resource]) for budget in asked)
            fix = f"the smallest feasible budget is {smallest}"
            if len(asked) > 1:
                fix = f"the smallest feasible budgets are {smallest}, each alone"
            raise BudgetInfeasible(f"the {named} cannot be met", fix=f"{fix}; most room takes {self._largest(over[0])}")

    def show(self, budget: Budget, used: float) -> str:
        """What options take of a budget's resource and what is fixed of it, in the budget's unit."""
        needed = Fraction(used) + Fraction(self.fixed(budget))
        return budget.show(needed / (self.weights or 1) if budget.kind == "bits" else needed)

    def _largest(self, budget: Budget) -> str:
        if not budget.stored:
            priced = self.priced[budget.resource]
            least = [(m.site.name, min(row)) for m, row in zip(self.menus, priced.costs, strict=True)]
            counted = sorted([*least, ("what no format changes", priced.fixed)], key=lambda item: -item[1])
            return ", ".join(f"{name} ({budget.show(Fraction(cost))})" for name, cost in counted[:3])
        sizes = [(m.site.name, min(m.bits()) // 8) for m in self.menus]
        stored = [*sizes, *self.floats, *(self.others if budget.kind == "bytes" else ())]
        largest = sorted((item for item in stored if item[1]), key=lambda item: -item[1])[:3]
        return ", ".join(f"{name} ({size_text(size)})" for name, size in largest)


def tightest(budgets: Sequence[Budget]) -> list[Budget]:
    """Of several budgets of one resource the one that decides."""
    least: dict[str, Budget] = {}
    for budget in budgets:
        known = least.get(budget.resource)
        least[budget.resource] = budget if known is None or budget.amount < known.amount else known
    return list(least.values())


def _grids(model: Model, menus: Sequence[Menu]) -> int:
    """How many values get a grid at most."""
    static = [m.site for m in menus if any(plan.activation == "static" for plan in m.plans)]
    products = {node for site in static for node in site.users if node.op_type != "Gather"}
    return len(choose_values(model.graph, products, outputs=True))


def assert_within(model: Model, budgets: Sequence[Budget]) -> tuple[float | None, int]:
    """(bits per weight, stored bytes) of the model's plan, counted anew; ContractViolated if over such a budget."""
    bits, weights = weight_bits(model)
    size = stored_bytes(model)
    for budget in (b for b in budgets if b.stored):
        amount = budget.spent(bits, weights, size)
        if amount > budget.amount:
            raise ContractViolated(f"the plan stores {budget.show(amount)}, more than {budget}", "allocate")
    return bits_per_weight(model), size
