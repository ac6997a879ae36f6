"""Choose how the weights of a plan are rounded, by the loss on held-back samples; never worse than to nearest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

from qcompiler.errors import BadOption, PassRefused, QcompilerError, Refusal
from qcompiler.measure.memory import spill
from qcompiler.model import Model
from qcompiler.passes.search.held_back import HeldBack
from qcompiler.passes.search.trials import Trial, steps_of
from qcompiler.pipeline import LOSSY, Pass, PassReport
from qcompiler.progress import Progress

_PLAIN = "nearest"


@dataclass(frozen=True)
class ChooseRounding(Pass):
    """Round a plan in several ways, keep the one that loses least, then try steps that refine it.

    Rounding to nearest is always among them: what comes out is never worse than that on the samples held back. With too
    few samples to hold some back, the first rounding and all steps are taken.

    Attributes:
        among: roundings, each from the float weights; options as in "gptq: samples = 24".
        then: steps that the best of them gets in any case, such as ranges of activations.
        after: steps that refine it, tried in turn; one that doesn't lower the loss is undone.
        target, seed: handed to the steps.
    """

    among: tuple[str, ...] = ("gptq",)
    then: tuple[str, ...] = ("activation-ranges",)
    after: tuple[str, ...] = ("bias-correction",)
    target: str = "onnx"
    seed: int = 0

    def __post_init__(self) -> None:
        for text, item in steps_of(self, (*self.among, *self.then, *self.after)).items():
            if item.contract != LOSSY or item.stage != "float" or (text in self.among and not item.makes_codes):
                raise BadOption(f"'{text}' rounds nothing", "pass 'choose-rounding'", "give roundings, such as gptq")

    def requires(self, model: Model) -> None:
        """Refuse a lowered model, and one without data."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if model.calibration is None:
            raise PassRefused("it needs calibration data", model.name, "give --calib, or use 'nearest'")

    def adds_bytes(self, model: Model) -> int:
        """As the greediest of the steps."""
        return max(
            (item.adds_bytes(model) for item in steps_of(self, (*self.among, *self.then, *self.after)).values()),
            default=0,
        )

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights`, and what else the kept steps fill; metrics hold every trial."""
        race = _Race(HeldBack.of(model, progress, self.registered_name()), model, progress)
        roundings = (_PLAIN, *self.among) if race.judge else (self.among or (_PLAIN,))[:1]
        for text, item in steps_of(self, tuple(dict.fromkeys(roundings))).items():
            race.enter(model, (text,), item)
        plain, least = race.trials[0].loss, race.least.loss
        for text, item in steps_of(self, self.then).items():
            race.go_on(text, item)
        for text, item in steps_of(self, self.after).items():
            race.enter(race.best, (*race.steps, text), item)
        model.weights, model.bias_shift, model.ranges = race.best.weights, race.best.bias_shift, race.best.ranges
        told = " + ".join(race.steps)
        if race.judge is not None:
            compared = f"weights alone {least:.4g}, to nearest {plain:.4g}"
            progress.note(f"choose-rounding: {told}, loss on held-back samples {race.least.loss:.4g} ({compared})")
        metrics = race.metrics | {"trials": [trial.to_json() for trial in race.trials], "chosen": told}
        return PassReport(self.registered_name(), len(model.weights), tuple(race.refused), metrics)


@dataclass
class _Race:
    """Roundings of one plan, and the best of them so far.

    Attributes:
        judge: says what each loses; None: every step is taken.
        best: the model that loses least.
        progress: shown to the steps.
        least: the trial that made it.
        trials: one a step.
        metrics: of the steps that made the best.
        refused: what those left alone, and steps that could not be had.
    """

    judge: HeldBack | None
    best: Model
    progress: Progress
    least: Trial = field(default_factory=lambda: Trial((), inf, 0.0))
    trials: list[Trial] = field(default_factory=list[Trial])
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    refused: list[Refusal] = field(default_factory=list[Refusal])

    @property
    def steps(self) -> tuple[str, ...]:
        """That made the best."""
        return self.least.steps

    def enter(self, start: Model, steps: tuple[str, ...], item: Pass) -> None:
        """Take the last of `steps` on a copy of `start`, and keep the outcome if none lost less."""
        began = time.monotonic()
        try:
            work, report = self._taken(start, item)
        except QcompilerError as reason:
            if not self.trials:
                raise
            self.refused.append(Refusal(reason.where or start.name, f"{steps[-1]}: {reason.what}"))
            self.progress.note(f"choose-rounding: no {steps[-1]}: {reason}")
            return
        trial = self._trial(steps, work, began)
        if trial.loss < self.least.loss or not self.trials or self.judge is None:
            self.best, self.least = work, trial
            self.metrics = {**self.metrics, **report.metrics} if len(steps) > 1 else dict(report.metrics)
            self.refused += report.refused
        self.trials.append(trial)

    def go_on(self, text: str, item: Pass) -> None:
        """Take a step on the best in any case."""
        began = time.monotonic()
        self.best, report = self._taken(self.best, item)
        self.metrics |= report.metrics
        self.refused += report.refused
        if report.changed:
            self.least = self._trial((*self.steps, text), self.best, began)
            self.trials.append(self.least)

    def _trial(self, steps: tuple[str, ...], work: Model, began: float) -> Trial:
        return Trial(steps, nan if self.judge is None else self.judge.loss(work), time.monotonic() - began)

    def _taken(self, start: Model, item: Pass) -> tuple[Model, PassReport]:
        work = start.clone()
        work.calibration = start.calibration if self.judge is None else self.judge.fit
        item.requires(work)
        report = item.run(work, self.progress)
        spill(work, start)
        return work, report
