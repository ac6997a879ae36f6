"""Transforms as options: menus that hold them, who must have them together, and the graph that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qcompiler import registry
from qcompiler.budget import Budget
from qcompiler.errors import BadOption
from qcompiler.formats import QuantSpec
from qcompiler.formats.varied import VariedSpec, plain
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Menu, site_bits
from qcompiler.passes.plan.ties import tied
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem
from qcompiler.solvers.solve import solve
from qcompiler.variants import Offer, Variant

NARROW = 4  # bits: rounding wider formats loses so little that a transform of it is not worth a measurement
_BLIND = ("hessian", "masked-output")  # methods that look at the bits of a format only
_SECONDS = 4.0


def variant_of(plan: SitePlan) -> str:
    """Name of the transform that an option comes with, or ""."""
    return plan.weight.variant if isinstance(plan.weight, VariedSpec) else ""


def require_known(names: Sequence[str], loss: str, budgets: Sequence[Budget]) -> None:
    """Raise BadOption for names that mean nothing, methods that are blind for transforms, costs that are not known."""
    made: dict[str, Variant] = {name: registry.find("variants", name)() for name in names}
    if made and loss in _BLIND:
        fix = "use another loss, such as gram"
        raise BadOption(f"loss '{loss}' does not see what a variant changes", "allocate", fix)
    costly = [name for name, variant in made.items() if not variant.free]
    measured = [budget for budget in budgets if not budget.stored]
    if costly and measured:
        what = (
            f"what variant '{costly[0]}' adds to {measured[0].kind} is not known, which the budget {measured[0]} needs"
        )
        raise BadOption(what, "allocate", f"leave out '{costly[0]}', or give a budget in bits or bytes")


@dataclass(frozen=True)
class Variants:
    """The transforms that may be had.

    Attributes:
        made: by name.
        offers: by name what they offered.
    """

    made: Mapping[str, Variant] = field(default_factory=dict[str, Variant])
    offers: Mapping[str, Offer] = field(default_factory=dict[str, Offer])

    @staticmethod
    def ask(names: Sequence[str], model: Model, menus: Sequence[Menu], progress: Progress) -> Variants:
        """Let the transforms look at the model; `menus` are plain."""
        made: dict[str, Variant] = {name: registry.find("variants", name)() for name in dict.fromkeys(names)}
        offers: dict[str, Offer] = {}
        for name, variant in made.items():
            formats = {m.site: _specs(_worthy(m, variant)) for m in menus}
            offers[name] = variant.offer(model, {s: specs for s, specs in formats.items() if specs}, progress)
        return Variants(made, offers)

    def extend(self, m: Menu) -> Menu:
        """A menu with what was offered, cheapest first."""
        more = [
            replace(
                plan, weight=VariedSpec.of(spec, name, offer.tokens.get(m.site.name, ""), offer.effects[m.site.name])
            )
            for name, offer in self.offers.items()
            if m.site.name in offer.effects
            for plan in _worthy(m, self.made[name])
            if (spec := plan.weight) is not None
        ]
        ordered = sorted((*m.plans, *more), key=lambda p: (site_bits(m.site, p), str(p.weight)))
        return replace(m, plans=tuple(ordered))

    def complete(self, menus: Sequence[Menu]) -> list[Menu]:
        """Menus without options that some of the sites that must have them together have lost to ties."""
        by_name = {m.site.name: m for m in menus}
        for variant, offer in self.offers.items():
            for group in offer.together:
                members = [by_name[name] for name in group]
                if not all(_has_all(m, variant) for m in members):
                    by_name |= {m.site.name: _without(m, variant) for m in members}
        return [by_name[m.site.name] for m in menus]

    def settle(self, menus: Sequence[Menu], problem: Problem) -> np.ndarray:
        """Losses [menus, options] of a problem, infinite where an option is not of the side that its group takes.

        Sites that read one value have its scales all or none, whatever their formats. Which of both is better is told
        at the prices of the problem in which each site is free: there loss + price * cost of a group is the sum of the
        least of its sites.
        """
        loss = problem.loss.copy()
        places = {m.site.name: unit for unit, m in enumerate(menus)}
        groups = [
            (variant, [places[name] for name in group])
            for variant, offer in self.offers.items()
            for group in offer.together
            if len(group) > 1 and all(name in places for name in group) and _in(menus[places[group[0]]], variant)
        ]
        if not groups:
            return loss
        free = replace(problem, cross=None)
        try:
            prices = solve(free, deadline=_SECONDS).multipliers
        except (InfeasibleProblem, NoChoiceFound):
            return loss  # whoever solves the problem says so
        priced = loss + sum((price * free.costs[name] for name, price in prices.items()), np.zeros_like(loss))
        for variant, units in groups:
            sides = [(unit, *_sides(menus[unit], variant, loss.shape[1])) for unit in units]
            on = sum(float(priced[unit][with_it].min()) for unit, with_it, _ in sides)
            off = sum(float(priced[unit][without].min()) for unit, _, without in sides)
            for unit, with_it, without in sides if min(on, off) < np.inf else ():
                loss[unit, ~(with_it if on < off else without)] = np.inf
        return loss

    def commit(self, model: Model, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
        """Change the graph as decided; the same plans with plain formats, and the names of the transforms.

        Those that cost nothing come first: they cannot be folded across branches in narrow numbers.
        """
        for name, variant in sorted(self.made.items(), key=lambda made: not made[1].free):
            chosen = {
                site: plain(plan.weight) for site, plan in decided.items() if variant_of(plan) == name and plan.weight
            }
            if chosen:
                variant.commit(model, chosen)
        return {site: replace(plain_plan(plan), variant=variant_of(plan)) for site, plan in decided.items()}

    def facts(self, decided: Mapping[str, SitePlan]) -> dict[str, Any]:
        """For the report: by name where each transform was offered, where it was taken, and where it cannot be had."""
        return {
            name: {
                "offered": len(offer.effects),
                "taken": [site for site, plan in decided.items() if plan.variant == name],
                "refused": {refusal.where: refusal.reason for refusal in offer.refused},
            }
            for name, offer in self.offers.items()
        }


def varied(
    model: Model, menus: list[Menu], names: Sequence[str], ties: Sequence[tuple[str, ...]], progress: Progress
) -> tuple[list[Menu], Variants]:
    """The menus with the transforms that may be had, by name.

    Args:
        model: float, with calibration data.
        menus: plain, tied already.
        names: of the transforms.
        ties: the sites that share one decision.
        progress: shows how far.
    """
    if not names:
        return menus, Variants()
    variants = Variants.ask(names, model, menus, progress)
    menus, _, _ = tied([variants.extend(m) for m in menus], ties)
    return variants.complete(menus), variants


def plain_plan(plan: SitePlan) -> SitePlan:
    """An option without its transform: what is stored of it and how it runs."""
    return plan if plan.weight is None else replace(plan, weight=plain(plan.weight))


def _narrow(m: Menu) -> list[SitePlan]:
    """The plain options of few bits."""
    return [plan for plan in m.plans if plan.weight is not None and plan.weight.bits <= NARROW and not variant_of(plan)]


def _worthy(m: Menu, variant: Variant) -> list[SitePlan]:
    """The options that a transform is offered with: one that takes room competes with the next better format."""
    narrow = _narrow(m)
    cheapest = {plan.weight.bits: plan for plan in reversed(narrow) if plan.weight is not None}
    return narrow if variant.free else list(cheapest.values())


def _specs(plans: Sequence[SitePlan]) -> list[QuantSpec]:
    return list(dict.fromkeys(plan.weight for plan in plans if plan.weight is not None))


def _in(m: Menu, variant: str) -> bool:
    return any(variant_of(plan) == variant for plan in m.plans)


def _has_all(m: Menu, variant: str) -> bool:
    """Whether each plain narrow option is there with the transform too."""
    own = {plain_plan(plan) for plan in m.plans if variant_of(plan) == variant}
    return own >= set(_narrow(m))


def _without(m: Menu, variant: str) -> Menu:
    return replace(m, plans=tuple(plan for plan in m.plans if variant_of(plan) != variant))


def _sides(m: Menu, variant: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Bool [width] each: options that go with the transform, and those that go without; wide ones with both."""
    names = [variant_of(plan) for plan in m.plans]
    wide = [
        not name and plan.weight is not None and plan.weight.bits > NARROW
        for name, plan in zip(names, m.plans, strict=True)
    ]
    rest = [False] * (width - len(names))
    own = [name == variant for name in names]
    return np.array([a or b for a, b in zip(own, wide, strict=True)] + rest), np.array([not a for a in own] + rest)
