"""Budgets in seconds and bit operations: what the options cost, and whether the chosen ones keep to it in truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from qcompiler.budget import Budget
from qcompiler.errors import BadOption, BudgetInfeasible, PassRefused
from qcompiler.graph.sites import Site
from qcompiler.measure.bops import site_bops, site_macs
from qcompiler.measure.cache import Cache, fingerprint
from qcompiler.measure.latency import Times, clock_of, preemptions
from qcompiler.measure.shapes import site_shapes
from qcompiler.model import Model
from qcompiler.passes.plan.ledger import Ledger, Priced, tightest
from qcompiler.passes.plan.trial import Feeds, trial_seconds
from qcompiler.passes.plan.variants import plain_plan
from qcompiler.plan import Plan
from qcompiler.progress import Progress
from qcompiler.solvers.hull import path
from qcompiler.solvers.least_cost import least_cost
from qcompiler.solvers.problem import Choice, NoChoiceFound, Problem, Solution, separable, without_ties
from qcompiler.target import Backend

Pose = Callable[[Ledger], Problem]
Solve = Callable[[Problem], Solution]
Ties = Sequence[tuple[int, ...]]
_TRIES = 3  # artifacts built to meet a latency
_UNUSED = 0.05  # share of a latency that may stay unused
_BUSY = 20  # times a second that a process loses the processor, where a machine has more work than processors
_DEADLINE = 30.0  # seconds for the fewest bit operations at a given loss


def require_clock(backend: Backend, budgets: Sequence[Budget]) -> None:
    """Raise BadOption where a budget is in seconds and the target cannot measure them; needs no model."""
    timed = next((budget for budget in budgets if budget.kind == "seconds"), None)
    if timed is not None and clock_of(backend) is None:
        what = f"target {backend.name} cannot measure times, which the budget {timed} needs"
        raise BadOption(what, "--budget", "use --target cpu, or a budget in bits, bytes or bit operations")


@dataclass
class Measured:
    """Prices the options of a ledger, and holds solutions against the clock.

    Attributes:
        model: float, with calibration data; its cache keeps the times.
        backend: the target.
        sites: all of the model.
        budgets: all that hold; those that are `stored` need nothing of this.
        progress: what long work reports to.
        facts: for the report, filled on the way; empty if every budget is stored.
    """

    model: Model
    backend: Backend
    sites: Sequence[Site]
    budgets: Sequence[Budget]
    progress: Progress
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def timed(self) -> list[Budget]:
        """The budgets in seconds, the tightest of each batch size."""
        return tightest([budget for budget in self.budgets if budget.kind == "seconds"])

    def price(self, ledger: Ledger, ties: Ties) -> Ledger:
        """The ledger with the costs that its budgets need.

        Raises:
            BadOption: the target cannot measure times, or the data and the model do not allow the batch.
            PassRefused: there is no data.
        """
        if all(budget.stored for budget in self.budgets):
            return ledger
        require_clock(self.backend, self.budgets)
        ledger = ledger.with_prices({"bops": self._bops(ledger)})
        for budget in self.timed:
            ledger = ledger.with_prices({budget.resource: self._seconds(ledger, budget, ties)})
        return ledger

    def confirm(self, ledger: Ledger, solution: Solution, pose: Pose, solve: Solve) -> tuple[Ledger, Solution]:
        """Build the chosen artifact and time it; where the sum of parts was wrong, correct it and solve again.

        Args:
            ledger: as `price` made it.
            solution: of its problem.
            pose: the problem of a ledger, with all budgets.
            solve: raises BudgetInfeasible.

        Returns:
            The solution of least loss whose artifact is fast enough, else the one that is least too slow, and the
            ledger with the fixed part as measured on it.
        """
        if self.timed:
            ledger, solution = self._keep_to_latency(ledger, solution, lambda priced: solve(pose(priced)))
            self._compare(ledger, pose(ledger), solution)
        if "bops" in ledger.priced:
            self.facts["bops"] = ledger.priced["bops"].fixed + _sum(ledger.priced["bops"].costs, solution.choice)
        return ledger, solution

    def _keep_to_latency(
        self, ledger: Ledger, solution: Solution, again: Callable[[Ledger], Solution]
    ) -> tuple[Ledger, Solution]:
        tried: list[tuple[float, float, Ledger, Solution]] = []
        for _ in range(_TRIES):
            ledger, over = self._try(ledger, solution)
            tried.append((max(over, 0.0), solution.objective, ledger, solution))
            if -_UNUSED <= over <= 0:
                break
            try:
                solution = again(ledger)
            except BudgetInfeasible:
                break
            if any(np.array_equal(solution.choice, other.choice) for *_, other in tried):
                break
        taken = min(range(len(tried)), key=lambda number: tried[number][:2])
        over, _, ledger, solution = tried[taken]
        for budget in self.timed:
            self.facts[budget.resource]["taken"] = taken
        self._judge(over)
        return ledger, solution

    def seconds(self, ledger: Ledger, choices: Sequence[Choice], budget: Budget) -> list[float]:
        """Measured seconds of the artifacts of some choices, timed in turns.

        They are kept in the model's cache, unless other processes took the processor all the time.
        """
        plans, feeds = [_plan(ledger, choice) for choice in choices], self._feeds(budget.batch)
        key = Cache.key("trial", 1, self._machine, self._fingerprint, [str(plan.to_json()["sites"]) for plan in plans],
                        [f"{name}{array.shape}" for name, array in sorted(feeds.items())])  # fmt: skip
        known = None if self.model.cache is None else self.model.cache.get(key)
        if known is not None:
            return [float(value) for value in known["seconds"]]
        before, start = preemptions(), time.monotonic()
        found = trial_seconds(self.model, plans, self.backend, feeds, self.progress)
        if preemptions() - before > _BUSY * (time.monotonic() - start):
            self.progress.note("allocate: the machine is busy, so that latencies may look longer than they are")
        elif self.model.cache is not None:
            self.model.cache.put(key, {"seconds": np.array(found)})
        return found

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model.ir)

    @cached_property
    def _machine(self) -> str:
        clock = clock_of(self.backend)
        assert clock is not None  # `require_clock`
        return clock.machine

    def _bops(self, ledger: Ledger) -> Priced:
        shapes = site_shapes(self.model.ir, self.sites, self._feeds(1))
        macs = {site.name: site_macs(site, shapes) for site in self.sites}
        decided = {m.site.name for m in ledger.menus}
        costs = [[float(site_bops(m.site, plan, macs[m.site.name])) for plan in m.plans] for m in ledger.menus]
        rest = sum(site_bops(site, None, macs[site.name]) for site in self.sites if site.name not in decided)
        return Priced(costs, float(rest))

    def _seconds(self, ledger: Ledger, budget: Budget, ties: Ties) -> Priced:
        """Measured costs; the fixed part is that of the fastest artifact."""
        clock = clock_of(self.backend)
        assert clock is not None  # `require_clock`
        feeds, menus = self._feeds(budget.batch), ledger.menus
        shapes = site_shapes(self.model.ir, [m.site for m in menus], feeds)
        times = Times(clock, self.model.cache)
        options = [[plain_plan(plan) for plan in m.plans] for m in menus]
        table = times.table([m.site for m in menus], options, shapes, self.progress)
        fastest = _fastest(ledger.with_prices({budget.resource: Priced(table)}), budget, ties)
        parts = _sum(table, fastest)
        whole = self.seconds(ledger, [fastest], budget)[0]
        fixed = max(0.0, whole - parts)
        self.facts[budget.resource] = {"budget": float(budget.amount), "fastest": whole, "fixed": fixed, "tries": []}
        self.progress.note(
            f"allocate: the fastest formats take {budget.show(Fraction(whole))}, "
            f"{budget.show(Fraction(fixed))} of it whatever the formats"
        )
        return Priced(table, fixed)

    def _try(self, ledger: Ledger, solution: Solution) -> tuple[Ledger, float]:
        """Time a solution: (the ledger with fixed parts that fit it, the largest share over a budget)."""
        over = -1.0
        for budget in self.timed:
            priced = ledger.priced[budget.resource]
            parts = _sum(priced.costs, solution.choice)
            whole = self.seconds(ledger, [solution.choice], budget)[0]
            predicted = priced.fixed + parts
            row = {"predicted": predicted, "fixed": priced.fixed, "measured": whole, "error": predicted / whole - 1}
            self.facts[budget.resource]["tries"].append(row)
            ledger = ledger.with_prices({budget.resource: Priced(priced.costs, max(0.0, whole - parts))})
            over = max(over, whole / float(budget.amount) - 1)
        return ledger, over

    def _judge(self, over: float) -> None:
        for budget in self.timed:
            first = self.facts[budget.resource]["tries"][0]
            self.progress.note(
                f"allocate: {budget} measured as {budget.show(Fraction(first['measured']))} where the sum of parts "
                f"predicts {budget.show(Fraction(first['predicted']))} ({first['error']:+.1%})"
            )
        if over > 0:
            self.progress.note(f"allocate: no artifact kept to the latency; the best takes {over:.1%} more")

    def _compare(self, ledger: Ledger, problem: Problem, solution: Solution) -> None:
        """Time the allocation by bit operations at equal predicted loss beside the solution, and say who is faster."""
        other = _fewest_bops(problem, solution)
        same = np.array_equal(other, solution.choice)
        for budget in self.timed:
            times = self.seconds(ledger, [solution.choice] if same else [solution.choice, other], budget)
            own, theirs = times[0], times[-1]
            self.facts[budget.resource] |= {
                "measured": own, "by_bops": theirs, "same_as_by_bops": same, "faster_than_by_bops": own < theirs,
                "loss": solution.objective, "loss_by_bops": problem.objective(other),
            }  # fmt: skip
            how = "the same as" if same else "faster than" if own < theirs else "NOT faster than"
            self.progress.note(
                f"allocate: {how} the allocation by bit operations at equal predicted loss "
                f"({budget.show(Fraction(own))} against {budget.show(Fraction(theirs))})"
            )

    def _feeds(self, batch: int) -> Feeds:
        """Inputs of one run of so many samples."""
        data = self.model.calibration
        if data is None:
            raise PassRefused("budgets in seconds and bit operations need calibration data", self.model.name)
        block = data.blocks[0]
        width = block.step or (1 if block.layout != "batched" else batch)
        if batch > 1 and (width != batch or block.count < batch):
            reason = f"a run takes {width}" if width != batch else f"there are only {block.count}"
            what = f"a latency of {batch} samples at once cannot be measured: {reason}"
            raise BadOption(what, "--budget", "write a latency without '@', or give more samples")
        return next(data.batches(batch, batch))


def _plan(ledger: Ledger, choice: Choice) -> Plan:
    return Plan({m.site.name: plain_plan(m.plans[int(o)]) for m, o in zip(ledger.menus, choice, strict=True)})


def _fastest(ledger: Ledger, budget: Budget, ties: Ties) -> Choice:
    """The fastest option of each menu, ties kept."""
    blank = [[0.0] * len(m.plans) for m in ledger.menus]
    merged, members = separable(ledger.problem(blank, [budget], ties))
    return np.where(merged.allowed, merged.costs[budget.resource], np.inf).argmin(axis=1)[members]


def _fewest_bops(problem: Problem, solution: Solution) -> Choice:
    """The choice of fewest bit operations that predicts no more loss, within the budgets that are stored.

    Exact without terms between units; with them, the first such choice on the equal-slope path that doesn't see them.
    """
    free = replace(problem, budgets={n: b for n, b in problem.budgets.items() if n in ("bits", "bytes")})
    if free.separable:
        try:
            return least_cost(free, "bops", solution.objective, deadline=_DEADLINE).choice
        except NoChoiceFound:
            return solution.choice
    merged, members = without_ties(free)
    steps = path(replace(merged, cross=None, pair_costs={}), "bops")
    choices = (steps.choices(stop)[members] for stop in range(len(steps.unit) + 1))
    good = (c for c in choices if free.feasible(c) and free.objective(c) <= solution.objective)
    return next(good, solution.choice)


def _sum(costs: Sequence[Sequence[float]], choice: Choice) -> float:
    return sum(row[int(o)] for row, o in zip(costs, choice, strict=True))
