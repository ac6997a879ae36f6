"""Trials: what a set of steps makes of a model, by its loss on held-back samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, log
from typing import Any

import numpy as np

from qcompiler.errors import QcompilerError
from qcompiler.measure.stream import measurement_key
from qcompiler.model import Model
from qcompiler.pipeline import Pass, parse_pass

_SHARED = ("target", "budget", "activations", "keep", "seed")


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        steps: that were taken.
        loss: on the held-back samples; infinite if it could not be had, NaN if there was nothing to judge by.
        seconds: that it took when it was measured.
        refused: why it could not be had.
    """

    steps: tuple[str, ...]
    loss: float
    seconds: float
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the report; a loss that is no number is None."""
        return asdict(self) | {"steps": list(self.steps), "loss": self.loss if isfinite(self.loss) else None}


def steps_of(outer: Pass, texts: Sequence[str]) -> dict[str, Pass]:
    """Passes by how they are written ("gptq: samples = 24"), with the options that they share with `outer`.

    Raises:
        BadOption: no such pass, no such option, or one of a wrong type.
    """
    shared = {name: getattr(outer, name) for name in _SHARED if hasattr(outer, name)}
    return {text: parse_pass(text, f"pass '{outer.registered_name()}'", shared) for text in texts}


def timed(model: Model, steps: tuple[str, ...], run: Callable[[], float], *key: object) -> Trial:
    """Run a trial, or take its loss from the cache of the model.

    Args:
        model: that the trial starts from.
        steps: their names.
        run: gives the loss; a step that refuses the model makes it a trial that could not be had.
        key: what else the loss depends on.
    """
    known = measurement_key(model, "trial", *key)
    found = None if model.cache is None or known is None else model.cache.get(known)
    if found is not None:
        return Trial(steps, float(found["loss"]), float(found["seconds"]))
    start = time.monotonic()
    try:
        with np.errstate(all="ignore"):  # what overflows loses infinitely much, or refuses
            loss = run()
    except QcompilerError as reason:
        return Trial(steps, float("inf"), time.monotonic() - start, str(reason))
    trial = Trial(steps, loss, time.monotonic() - start)
    if model.cache is not None and known is not None:
        model.cache.put(known, {"loss": np.array(loss), "seconds": np.array(trial.seconds)})
    return trial


def interactions(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """How steps get on: for every two of which each alone, both, and neither were tried.

    Returns:
        Rows with first, second, and in nats of the loss: alone (what each gains alone), both (what they gain together)
        and interaction, both minus the sum of alone; below 0 they fight each other.
    """
    gains = _gains(trials)
    singles = [steps[0] for steps in gains if len(steps) == 1]
    rows: list[dict[str, Any]] = []
    for number, first in enumerate(singles):
        for second in singles[number + 1 :]:
            both = gains.get((first, second), gains.get((second, first)))
            if both is not None:
                alone = [gains[(first,)], gains[(second,)]]
                facts = {"alone": alone, "both": both, "interaction": both - sum(alone)}
                rows.append({"first": first, "second": second, **facts})
    return rows


def _gains(trials: Sequence[Trial]) -> dict[tuple[str, ...], float]:
    """By steps: the logarithm of by how much they lower the loss."""
    usable = {trial.steps: trial.loss for trial in trials if 0 < trial.loss < float("inf")}
    plain = usable.get(())
    return {} if plain is None else {steps: log(plain / loss) for steps, loss in usable.items()}
