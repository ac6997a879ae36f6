"""Choose which transforms a model gets, by what they do to its loss once it is rounded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import ClassVar, Literal, get_args

from qcompiler import registry
from qcompiler.budget import parse_budget
from qcompiler.errors import BadOption, PassRefused
from qcompiler.measure.memory import spill
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Activations
from qcompiler.passes.search.held_back import HeldBack
from qcompiler.passes.search.stand_in import stand_in
from qcompiler.passes.search.trials import Trial, interactions, steps_of, timed
from qcompiler.passes.transform.inputs import require_float
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent

_MARGIN = 0.97  # of the loss: less is not worth a step, nor more than chance
_CLOSE = 1.1  # times the least loss: trials without a plan tell no more apart
_Steps = tuple[str, ...]


@dataclass(frozen=True)
class ChooseTransforms(Pass):
    """Try transforms alone and together, and apply the set with which the rounded model loses least.

    A trial transforms a copy of the model, gives every site about the bits that the budget leaves on average, rounds,
    and takes the loss on calibration samples that are held back. Tried are: no transform, those of `start`, each
    alone, and then, from the best so far, every set with one more or one less, until none is better. What each gains,
    and which fight each other, is in the report. All steps are exact, so the function of the model stays as it is.

    Formats of one width hide that mixed precision lives on what transforms take away: layers and channels that differ.
    So with `plan` the best set, and of those of `start` and none what comes close to it, are tried once more with
    the plan that they would get, and these trials decide.

    Attributes:
        among: transforms in the order in which they are applied; options as in "smooth: strength = 0.3".
        start: those that are applied where there is no time, or too little data, to try.
        rounding: what trials round with.
        plan: what gives the last trials their formats, such as "allocate"; empty: there are no such trials. It sees all
            of the calibration data, so that it need not measure again what is chosen.
        seconds: time that trials may take; one that has begun is finished.
        pairs: also try every two of them, for the table of interactions.
        budget, target, activations, keep, seed: as `allocate` has them; they say what trials round to.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    hints: ClassVar[tuple[str, ...]] = ("budget", "activations", "keep")
    among: tuple[str, ...] = ("scale-fold", "smooth")
    start: tuple[str, ...] = ()
    rounding: str = "gptq"
    plan: str = ""
    seconds: float = 300.0
    pairs: bool = False
    budget: tuple[str, ...] = ()
    target: str = "onnx"
    activations: str = "auto"
    keep: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        steps = steps_of(self, (*self.among, self.rounding, *self._plans))
        where = "pass 'choose-transforms'"
        if self.plan and self.plan.partition(":")[0].strip() not in registry.names("passes"):
            raise BadOption(f"there is no pass '{self.plan}'", where, "give a planner, such as allocate")
        if any(steps[text].contract == EXACT or steps[text].makes_codes for text in self._plans):
            raise BadOption(f"'{self.plan}' plans nothing", where, "give a planner, such as allocate")
        for text in self.among:
            if steps[text].contract != EXACT or steps[text].stage != "float":
                raise BadOption(f"'{text}' changes what the model computes", where, "give transforms that are exact")
        if not steps[self.rounding].makes_codes:
            raise BadOption(f"'{self.rounding}' rounds nothing", where, "give a rounding, such as gptq")
        if len(set(self.among)) < len(self.among) or not set(self.start) <= set(self.among):
            raise BadOption("each of 'among' is there once, and those of 'start' are among them", where)
        if self.activations not in get_args(Activations):
            raise BadOption(
                f"unknown activations '{self.activations}'", where, f"use {', '.join(get_args(Activations))}"
            )
        if not self.seconds >= 0:
            raise BadOption(f"seconds cannot be {self.seconds}", where, "give 0 or more")

    def requires(self, model: Model) -> None:
        """Float weights, calibration data."""
        require_float(model, data=True)

    def adds_bytes(self, model: Model) -> int:
        """As the greediest of the steps."""
        steps = steps_of(self, (*self.among, self.rounding, *self._plans))
        return max(item.adds_bytes(model) for item in steps.values())

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Try, choose, apply."""
        trials, decided = self._searched(model, progress) if self.among else ([Trial((), nan, 0.0)], ())
        best = self._ordered(decided)
        reports = self._transformed(model, best, progress)
        told = " + ".join(best) or "none"
        progress.note(f"choose-transforms: {told} ({len(trials)} tried)")
        metrics = {name: value for report in reports for name, value in report.metrics.items()}
        metrics |= {"trials": [trial.to_json() for trial in trials], "interactions": interactions(trials)}
        refused = tuple(refusal for report in reports for refusal in report.refused)
        metrics |= {"chosen": told, "decided_by": " + ".join(decided) or "none"}
        return PassReport(self.registered_name(), len(reports), refused, metrics)

    @property
    def _plans(self) -> tuple[str, ...]:
        """The planner of the last trials, if there are to be such; without a budget there is nothing to plan for."""
        return (self.plan,) if self.plan and self.budget else ()

    def _searched(self, model: Model, progress: Progress) -> tuple[list[Trial], _Steps]:
        """All trials, in the order in which they were made, and the steps of the one that decides."""
        start = self._ordered(self.start)
        if not self._stand_in(model).sites:  # nothing can be rounded, so that nothing can be told apart
            return [Trial((), nan, 0.0)], ()
        judge = HeldBack.of(model, progress, self.registered_name()) if self.seconds else None
        if judge is None:
            return [Trial(start, nan, 0.0)], start
        trials = self._trials(model, judge, progress)
        if start not in [trial.steps for trial in trials]:  # the time was over before
            return trials, start
        best = _fewest(trials).steps
        planned = [self._try_planned(model, steps, judge, progress) for steps in self._close(trials, best)]
        known = [trial for trial in planned if trial.loss < inf]
        return [*trials, *planned], _fewest(known).steps if known else best

    def _close(self, trials: Sequence[Trial], best: _Steps) -> list[_Steps]:
        """What is tried with a plan: the best, and what it has to beat where that is close."""
        losses = {trial.steps: trial.loss for trial in trials}
        limit = _CLOSE * min(losses.values())
        rivals = dict.fromkeys(((), self._ordered(self.start), min(losses, key=lambda steps: losses[steps])))
        close = [steps for steps in rivals if steps != best and losses.get(steps, inf) <= limit]
        return [best, *close] if self._plans and close else []

    def _trials(self, model: Model, judge: HeldBack, progress: Progress) -> list[Trial]:
        """Trials with formats of one width."""
        end = time.monotonic() + self.seconds
        done: dict[_Steps, Trial] = {}
        first = [(), self.start, *((text,) for text in self.among)]
        if self.pairs:
            first += [(a, b) for i, a in enumerate(self.among) for b in self.among[i + 1 :]]
        wanted = list(dict.fromkeys(self._ordered(steps) for steps in first))
        while wanted:
            for steps in progress.track(wanted, "Trying transforms"):
                if done and time.monotonic() > end:
                    return list(done.values())
                done[steps] = self._try(model, steps, judge)
            best = min(done.values(), key=lambda trial: trial.loss).steps
            toggled = [self._ordered(set(best) ^ {text}) for text in self.among]
            wanted = [steps for steps in dict.fromkeys(toggled) if steps not in done]
        return list(done.values())

    def _transformed(self, model: Model, steps: _Steps, progress: Progress) -> list[PassReport]:
        """Apply steps; those that ask for formats are told those of the stand-in."""
        before, reports = model.plan, list[PassReport]()
        model.plan = self._stand_in(model)
        for item in steps_of(self, steps).values():
            item.requires(model)
            reports.append(item.run(model, progress))
        model.plan = before
        return reports

    def _stand_in(self, model: Model) -> Plan:
        budgets = [parse_budget(text) for text in self.budget]
        return stand_in(model, budgets, self.target, self.activations, self.keep)  # type: ignore[arg-type]

    def _ordered(self, steps: Sequence[str] | set[str]) -> _Steps:
        return tuple(text for text in self.among if text in steps)

    def _try(self, model: Model, steps: _Steps, judge: HeldBack) -> Trial:
        def run() -> float:
            work = model.clone()
            work.calibration = judge.fit
            reports = self._transformed(work, steps, Silent())
            idle = [report.name for report in reports if not report.changed]
            if idle:  # a trial without it says the same
                raise PassRefused(f"{idle[0]} changes nothing", model.name)
            spill(work, model)
            work.plan = self._stand_in(work)
            return self._rounded_loss(work, model, judge)

        return timed(model, steps, run, "transforms", steps, self._settings)

    def _try_planned(self, model: Model, steps: _Steps, judge: HeldBack, progress: Progress) -> Trial:
        def run() -> float:
            progress.note(f"choose-transforms: a plan with {' + '.join(steps) or 'none'}")
            work = model.clone()
            self._transformed(work, steps, Silent())
            spill(work, model)
            planner = steps_of(self, self._plans)[self.plan]
            planner.requires(work)
            planner.run(work, progress)
            if not work.plan.sites:
                raise PassRefused(f"{planner.registered_name()} plans nothing", model.name)
            work.calibration = judge.fit
            return self._rounded_loss(work, model, judge)

        return timed(model, (*steps, self.plan), run, "planned transforms", steps, self.plan, self._settings)

    def _rounded_loss(self, work: Model, model: Model, judge: HeldBack) -> float:
        """Round a clone of the model by its plan; what it then loses."""
        passes = steps_of(self, (self.rounding, "activation-ranges"))
        passes[self.rounding].run(work, Silent())
        if any(plan.activation == "static" for plan in work.plan.sites.values()):
            passes["activation-ranges"].run(work, Silent())
        spill(work, model)
        return judge.loss(work)

    @property
    def _settings(self) -> tuple[object, ...]:
        return self.rounding, self.budget, self.target, self.activations, self.keep, self.seed


def _fewest(trials: Sequence[Trial]) -> Trial:
    """The least loss; of those that differ by less than the margin the one of fewest steps."""
    best, *others = sorted(trials, key=lambda trial: len(trial.steps))
    for trial in others:
        if trial.loss < best.loss * _MARGIN:
            best = trial
    return best
