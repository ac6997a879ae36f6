"""Choose which transforms a model gets, by what they do to its loss once it is rounded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import ClassVar, Literal, get_args

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

_MARGIN = 0.99  # of the loss: less is not worth a step
_Steps = tuple[str, ...]


@dataclass(frozen=True)
class ChooseTransforms(Pass):
    """Try transforms alone and together, and apply the set with which the rounded model loses least.

    A trial transforms a copy of the model, gives every site about the bits that the budget leaves on average, rounds,
    and takes the loss on calibration samples that are held back. Tried are: no transform, those of `start`, each
    alone, and then, from the best so far, every set with one more or one less, until none is better. What each gains,
    and which fight each other, is in the report. All steps are exact, so the function of the model stays as it is.

    Attributes:
        among: transforms in the order in which they are applied; options as in "smooth: strength = 0.3".
        start: those that are applied where there is no time, or too little data, to try.
        rounding: what trials round with.
        seconds: time that trials may take; one that has begun is finished.
        pairs: also try every two of them, for the table of interactions.
        budget, target, activations, keep, seed: as `allocate` has them; they say what trials round to.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    hints: ClassVar[tuple[str, ...]] = ("budget", "activations", "keep")
    among: tuple[str, ...] = ("scale-fold", "smooth")
    start: tuple[str, ...] = ()
    rounding: str = "gptq"
    seconds: float = 300.0
    pairs: bool = False
    budget: tuple[str, ...] = ()
    target: str = "onnx"
    activations: str = "auto"
    keep: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        steps = steps_of(self, (*self.among, self.rounding))
        where = "pass 'choose-transforms'"
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
        return max(item.adds_bytes(model) for item in steps_of(self, (*self.among, self.rounding)).values())

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Try, choose, apply."""
        trials = self._trials(model, progress) if self.among else [Trial((), nan, 0.0)]
        best = _fewest(trials)
        reports = self._transformed(model, best.steps, progress)
        told = " + ".join(best.steps) or "none"
        progress.note(f"choose-transforms: {told} ({len(trials)} tried)")
        metrics = {name: value for report in reports for name, value in report.metrics.items()}
        metrics |= {"trials": [trial.to_json() for trial in trials], "interactions": interactions(trials)}
        refused = tuple(refusal for report in reports for refusal in report.refused)
        return PassReport(self.registered_name(), len(reports), refused, metrics | {"chosen": told})

    def _trials(self, model: Model, progress: Progress) -> list[Trial]:
        """All trials, in the order in which they were made."""
        if not self._stand_in(model).sites:  # nothing can be rounded, so that nothing can be told apart
            return [Trial((), nan, 0.0)]
        judge = HeldBack.of(model, progress, self.registered_name()) if self.seconds else None
        if judge is None:
            return [Trial(self._ordered(self.start), nan, 0.0)]
        end = time.monotonic() + self.seconds
        done: dict[_Steps, Trial] = {}
        first = [(), self.start, *((text,) for text in self.among)]
        if self.pairs:
            first += [(a, b) for i, a in enumerate(self.among) for b in self.among[i + 1 :]]
        wanted = [self._ordered(steps) for steps in first]
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
            passes = steps_of(self, (self.rounding, "activation-ranges"))
            passes[self.rounding].run(work, Silent())
            if any(plan.activation == "static" for plan in work.plan.sites.values()):
                passes["activation-ranges"].run(work, Silent())
            spill(work, model)
            return judge.loss(work)

        key = (self.rounding, self.budget, self.target, self.activations, self.keep, self.seed)
        return timed(model, steps, run, "transforms", steps, key)


def _fewest(trials: Sequence[Trial]) -> Trial:
    """The least loss; of those that differ by less than the margin the one of fewest steps."""
    best, *others = sorted(trials, key=lambda trial: len(trial.steps))
    for trial in others:
        if trial.loss < best.loss * _MARGIN:
            best = trial
    return best
