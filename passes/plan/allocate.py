"""Give every site its own number format: least predicted loss within the budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcompiler import registry
from qcompiler.budget import Budget, kept_sites, parse_budget
from qcompiler.errors import BadOption, BudgetInfeasible, PassRefused, Refusal
from qcompiler.graph.sites import Site, find_sites
from qcompiler.graph.topology import tie_groups
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Activations, Menu, menu, passed_over, site_bits, target_for
from qcompiler.passes.plan.ledger import Ledger, assert_within
from qcompiler.pipeline import Pass, PassReport
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Progress
from qcompiler.solvers.hull import curve
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import solve
from qcompiler.target import Backend

_ACTIVATIONS: dict[str, Activations] = {"auto": "auto", "float": "float", "static": "static", "dynamic": "dynamic"}
_TIES = ("target", "none", "inputs", "adds")
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Allocate(Pass):
    """Mixed precision by an integer program over measured losses.

    Every option of every site is measured alone (`measure.sensitivity`), their losses are added up, and a
    solver picks one option a site. The plan carries the predicted loss, a proven lower bound and the gap.

    Attributes:
        budget: "3.5bits", "120MB", or several that hold together.
        target: offers the options.
        bits: widths to consider.
        group_sizes: group sizes to offer beside the target's own.
        activations: "auto" (what is fastest on the target), "float", "static" or "dynamic".
        keep: sites to leave float: globs on their names, or "embeddings". Outside the average of bits.
        ties: which sites share one decision: those that read one value ("inputs"), also those that write the
            operands of one Add ("adds"), "none", or what the target asks for.
        method: "auto", or a solver by name: lagrangian, ilp.
        samples: calibration samples to measure with; 0: as many as the time allows.
        seconds: time that measuring may take.
    """

    budget: str | tuple[str, ...] = ("4bits",)
    target: str = "onnx"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    group_sizes: tuple[int, ...] = ()
    activations: str = "auto"
    keep: tuple[str, ...] = ()
    ties: str = "target"
    method: str = "auto"
    samples: int = 0
    seconds: float = 240.0

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", (self.budget,))
        if not self.budgets:
            raise BadOption("no budget is given", "allocate", "write bits per weight (3.5bits) or a size (120MB)")
        for name, known in (("activations", tuple(_ACTIVATIONS)), ("ties", _TIES)):
            if getattr(self, name) not in known:
                raise BadOption(f"{name} cannot be '{getattr(self, name)}'", "allocate", f"use {', '.join(known)}")
        if not self.bits or min(self.bits) < 2 or any(size < 1 for size in self.group_sizes):
            raise BadOption("bits must be 2 or more, group sizes positive", "allocate")
        if self.method != "auto":
            registry.find("solvers", self.method)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets, parsed."""
        return tuple(parse_budget(text) for text in self.budget)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.plan`."""
        mode = _ACTIVATIONS[self.activations]
        backend = target_for(self.target, mode)
        sites = find_sites(model.ir)
        kept = kept_sites(sites, self.keep)
        free = [site for site in sites if site.name not in kept]
        menus = [menu(backend, site, self.bits, self.group_sizes, mode) for site in free]
        menus, groups, refused = _tied(menus, self._tie_names(backend, model, free))
        ledger = Ledger.of(model, sites, menus, kept)
        ledger.require_feasible(self.budgets, groups)
        losses, measured = self._measure(model, ledger.menus, progress)
        problem = ledger.problem(losses, self.budgets, groups)
        solution = self._solve(problem)
        decided = {m.site.name: m.plans[int(o)] for m, o in zip(ledger.menus, solution.choice, strict=True)}
        model.plan = Plan(decided, kept=kept)
        bits, size = assert_within(model, self.budgets)
        model.plan = replace(model.plan, solution=_facts(self, ledger, problem, solution, size))
        progress.note(
            f"allocate: {bits:.3f} bits per weight, predicted loss {solution.objective:.4g}, gap {solution.gap:.2%}"
        )
        refused += [*(refusal for m in menus for refusal in m.refused), *passed_over(model, sites, progress)]
        table = _table(ledger, losses, solution)
        metrics = {"bits_per_weight": bits, "stored_bytes": size, "sites": table, "measured": measured}
        return PassReport("allocate", len(decided), tuple(refused), metrics)

    def _tie_names(self, backend: Backend, model: Model, sites: Sequence[Site]) -> list[tuple[str, ...]]:
        ties = getattr(backend, "ties", "none") if self.ties == "target" else self.ties
        return [] if ties == "none" else tie_groups(model.ir, sites, add_inputs=ties == "adds")

    def _measure(
        self, model: Model, menus: Sequence[Menu], progress: Progress
    ) -> tuple[list[list[float]], dict[str, Any]]:
        """Losses per menu and option; an option whose loss is not finite is never chosen."""
        if not menus:
            return [], {}
        measured = sensitivities(
            model,
            [m.site for m in menus],
            [list(m.plans) for m in menus],
            samples=self.samples,
            seconds=self.seconds,
            progress=progress,
        )
        losses = [[v if math.isfinite(v) else math.inf for v in map(float, row)] for row in measured.loss]
        if all(min(row) == math.inf for row in losses):
            what = "the output is infinite or NaN on the calibration data, whatever the formats"
            where = f"{model.name}, largest weights in {_largest(menus)}"
            raise PassRefused(what, where, "repair the weights or the data")
        for m, row in zip(menus, losses, strict=True):
            if min(row) == math.inf:
                raise PassRefused("every option makes the output infinite or NaN", m.site.name, "keep it float: --keep")
        facts = {name: getattr(measured, name) for name in ("mode", "samples", "probes", "seconds")}
        return losses, facts

    def _solve(self, problem: Problem) -> Solution:
        try:
            if self.method == "auto":
                return solve(problem)
            return registry.find("solvers", self.method)(problem, 60.0)
        except (InfeasibleProblem, NoChoiceFound) as error:
            raise BudgetInfeasible(f"the budgets {', '.join(self.budget)} cannot be met together ({error})") from error


def _largest(menus: Sequence[Menu]) -> str:
    """The site with the largest weight: the first suspect where numbers overflow."""
    return max(menus, key=lambda m: float(np.abs(m.site.matrix()).max())).site.name


def _tied(
    menus: list[Menu], groups: Sequence[tuple[str, ...]]
) -> tuple[list[Menu], list[tuple[int, ...]], list[Refusal]]:
    """Give tied sites the options that all of them have, in one order; the groups as indices of non-empty menus."""
    by_name = {m.site.name: m for m in menus if m.plans}
    kept_groups: list[list[str]] = []
    refused: list[Refusal] = []
    for names in ([n for n in group if n in by_name] for group in groups):
        by_name |= _equally_wide([by_name[n] for n in names])
        shared = [p for p in by_name[names[0]].plans if all(p in by_name[n].plans for n in names)] if names else []
        if len(names) > 1 and shared:
            kept_groups.append(names)
            by_name |= {n: replace(by_name[n], plans=tuple(shared)) for n in names}
        elif len(names) > 1:
            refused.append(Refusal(", ".join(names), "not tied: they have no option in common"))
    index = {name: number for number, name in enumerate(by_name)}
    groups_by_index = [tuple(index[n] for n in names) for names in kept_groups]
    return [by_name.get(m.site.name, m) for m in menus], groups_by_index, refused


def _equally_wide(menus: Sequence[Menu]) -> dict[str, Menu]:
    """Float32 scales for all where one of them needs them: options that differ in nothing else stay common."""

    def wide(plan: SitePlan) -> SitePlan:
        assert plan.weight is not None
        return replace(plan, weight=replace(plan.weight, scale_dtype="float32"))

    needed = {p for m in menus for p in m.plans if p == wide(p)}
    found: dict[str, Menu] = {}
    for m in menus:
        plans = {wide(p) if wide(p) in needed else p for p in m.plans}  # a target may itself offer both: one option
        order = sorted(plans, key=lambda p, site=m.site: (site_bits(site, p), str(p.weight)))
        found[m.site.name] = replace(m, plans=tuple(order))
    return found


def _facts(options: Allocate, ledger: Ledger, problem: Problem, solution: Solution, size: int) -> dict[str, Any]:
    points = curve(problem, "bits") if ledger.menus else []
    thin = max(1, -(-len(points) // _CURVE_POINTS))
    shown = [p for i, p in enumerate(points) if i % thin == 0 or i == len(points) - 1]
    bits = ledger.average(problem.used(solution.choice, "bits"))
    return {
        "budgets": list(options.budget),
        "predicted_loss": solution.objective,
        "lower_bound": solution.bound,
        "gap": solution.gap,
        "method": solution.method,
        "status": solution.status,
        "prices": dict(solution.multipliers),
        "seconds": solution.seconds,
        "bits_per_weight": bits,
        "stored_bytes": size,
        "chosen": [bits, solution.objective],
        "curve": [[ledger.average(p.cost), p.loss] for p in shown],
    }


def _table(ledger: Ledger, losses: Sequence[Sequence[float]], solution: Solution) -> list[dict[str, Any]]:
    """One row a site, for the report: what was chosen, and what every option would have cost and lost."""
    return [_row(m, row, int(o)) for m, row, o in zip(ledger.menus, losses, solution.choice, strict=True)]


def _row(m: Menu, losses: Sequence[float], chosen: int) -> dict[str, Any]:
    def option(plan: SitePlan, loss: float) -> dict[str, Any]:
        assert plan.weight is not None
        stored = site_bits(m.site, plan)
        finite = loss if math.isfinite(loss) else None
        return {"spec": str(plan.weight), "width": plan.weight.bits, "bits": stored, "loss": finite}

    options = [option(plan, loss) for plan, loss in zip(m.plans, losses, strict=True)]
    site = m.site
    activation = m.plans[chosen].activation
    facts = {"site": site.name, "op": site.op, "weights": site.count, "activation": activation}
    return {
        **facts,
        **options[chosen],
        "bytes": -(-int(options[chosen]["bits"]) // 8),
        "chosen": chosen,
        "options": options,
    }
