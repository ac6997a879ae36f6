"""Choose how the weights of a plan are rounded, by the loss on held-back samples; never worse than to nearest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, ClassVar

from qcompiler.errors import BadOption, PassRefused, QcompilerError, Refusal
from qcompiler.measure.memory import spill
from qcompiler.measure.samples import samples_for_one
from qcompiler.model import Model
from qcompiler.passes.search.held_back import HeldBack
from qcompiler.passes.search.trials import Trial, steps_of
from qcompiler.pipeline import LOSSY, Pass, PassReport
from qcompiler.progress import Progress

_PLAIN = "nearest"
_CLOSE = 1.5  # times the least loss: roundings that may still be the best when activations are rounded too


@dataclass(frozen=True)
class ChooseRounding(Pass):
    """Round a plan in several ways, refine what is nearly the best by further steps, and keep what loses least then.

    Rounding to nearest is always among them: what comes out is never worse than that on the samples held back. With too
    few samples to hold some back, the first rounding and all steps are taken.

    Attributes:
        among: roundings, each from the float weights; options as in "gptq: samples = 24".
        then: steps that each gets in any case, such as ranges of activations.
        after: steps that refine it, tried in turn; one that doesn't lower the loss is undone.
        refit: take the chosen steps once more with all samples, where they ask for more than were left to fit on: in
            front of nothing that judges by the same samples, such as `tune`. It stays where the loss on the samples
            that were held back, and are not any more, is no higher.
        target, seed: handed to the steps.
    """

    makes_codes: ClassVar[bool] = True
    among: tuple[str, ...] = ("gptq",)
    then: tuple[str, ...] = ("activation-ranges",)
    after: tuple[str, ...] = ("bias-correction",)
    refit: bool = False
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
        judge = HeldBack.of(model, progress, self.registered_name())
        chains, refused = self._rounded(model, judge, progress)
        alone = [chain.least.loss for chain in chains]
        ahead = [chain for chain in chains if judge is None or chain.least.loss <= _CLOSE * min(alone)]
        for chain in ahead:
            for text, item in steps_of(self, self.then).items():
                chain.go_on(text, item)
            for text, item in steps_of(self, self.after).items():
                chain.enter(chain.best, (*chain.steps, text), item)
        found = min(ahead, key=lambda chain: chain.least.loss)
        refitted = False
        if judge is not None and self._lacked(model, found.steps, judge):
            refitted = self._again(model, found, judge, progress)
        model.weights, model.bias_shift, model.ranges = found.best.weights, found.best.bias_shift, found.best.ranges
        told = " + ".join(found.steps)
        if judge is not None:
            compared = f"weights alone {found.trials[0].loss:.4g}, to nearest {alone[0]:.4g}"
            progress.note(f"choose-rounding: {told}, loss on held-back samples {found.least.loss:.4g} ({compared})")
        trials = [trial.to_json() for chain in chains for trial in chain.trials]
        metrics = found.metrics | {"trials": trials, "chosen": told, "refitted": refitted}
        return PassReport(self.registered_name(), len(model.weights), (*refused, *found.refused), metrics)

    def _lacked(self, model: Model, steps: tuple[str, ...], judge: HeldBack) -> bool:
        """Whether one of the steps asks for more samples than it could be fitted on in its trial."""
        wanted = [getattr(item, "samples", 0) for item in steps_of(self, steps).values()]
        return self.refit and max(wanted, default=0) * samples_for_one(model.ir, judge.fit) > judge.fit.count

    def _again(self, model: Model, found: _Chain, judge: HeldBack, progress: Progress) -> bool:
        """Take the steps of the best with all data; whether that is kept."""
        progress.note("choose-rounding: once more with the samples that were held back")
        again = _Chain(None, model, progress)
        try:
            for text, item in steps_of(self, found.steps).items():
                again.go_on(text, item)
        except QcompilerError as reason:
            found.refused.append(_left_out("second time", reason, model, progress))
            return False
        if not judge.loss(again.best) <= found.least.loss:
            return False
        found.best, found.metrics, found.refused = again.best, again.metrics, again.refused
        return True

    def _rounded(self, model: Model, judge: HeldBack | None, progress: Progress) -> tuple[list[_Chain], list[Refusal]]:
        """The model in every rounding, to nearest first; those that could not be had."""
        roundings = (_PLAIN, *self.among) if judge else (self.among or (_PLAIN,))[:1]
        chains: list[_Chain] = []
        refused: list[Refusal] = []
        for text, item in steps_of(self, tuple(dict.fromkeys(roundings))).items():
            chain = _Chain(judge, model, progress)
            try:
                chain.enter(model, (text,), item)
                chains.append(chain)
            except QcompilerError as reason:
                if not chains or isinstance(reason, BadOption):
                    raise
                refused.append(_left_out(text, reason, model, progress))
        return chains, refused


@dataclass
class _Chain:
    """One rounding of the plan, and what came of it by further steps.

    Attributes:
        judge: says what each step loses; None: every step is taken.
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
        """Take the last of `steps` on a copy of `start`, and keep the outcome if none lost less.

        Raises:
            QcompilerError: the first step refuses; later ones are left out.
        """
        began = time.monotonic()
        try:
            work, report = self._taken(start, item)
        except QcompilerError as reason:
            if not self.trials or isinstance(reason, BadOption):
                raise
            self.refused.append(_left_out(steps[-1], reason, start, self.progress))
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
        before = work.parts()
        report = item.run(work, self.progress)
        if work.plan != start.plan or work.parts() != before:
            what = f"'{item.registered_name()}' changes the graph or the plan, which roundings leave alone"
            raise BadOption(what, "pass 'choose-rounding'", "put it into the pipeline, as a pass of its own")
        spill(work, start)
        return work, report


def _left_out(text: str, reason: QcompilerError, model: Model, progress: Progress) -> Refusal:
    """Tell the user which step could not be had, and keep it for the report."""
    progress.note(f"choose-rounding: no {text}: {reason}")
    return Refusal(reason.where or model.name, f"{text}: {reason.what}")
