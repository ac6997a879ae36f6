"""Where a learning pass has come to, kept in the cache, so that a killed run goes on and a repeated one is quick.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qcompiler.measure.stream import measurement_key
from qcompiler.model import Model


class TrainingState:
    """Parameters, Adam's averages and the number of steps.

    Args:
        model: with a cache or without; the entry is of its graph, calibration data, codes, ranges and shifts.
        adam: the optimizer.
        settings: all else that the result depends on, as text.
    """

    def __init__(self, model: Model, adam: torch.optim.Optimizer, settings: str) -> None:
        tables = [[name, q.spec, q.codes, q.scale, q.zero] for name, q in sorted(model.weights.items())]
        tables += [[name, found] for name, found in sorted(model.ranges.items())]
        tables += [[name, found] for name, found in sorted(model.bias_shift.items())]
        self._cache, self._key = model.cache, measurement_key(model, "training", settings, tables)
        self._adam = adam

    def load(self) -> int:
        """Go back to where an earlier run had come; the number of steps done."""
        found = None if self._cache is None or self._key is None else self._cache.get(self._key)
        parameters = self._parameters
        if found is None or any(f"value.{i}" not in found for i in range(len(parameters))):
            return 0
        done = int(found["steps"])
        for i, parameter in enumerate(parameters):
            parameter.data.copy_(torch.from_numpy(found[f"value.{i}"]))
            if f"mean.{i}" in found:
                self._adam.state[parameter] = {
                    "step": torch.tensor(float(found[f"step.{i}"])),
                    "exp_avg": torch.from_numpy(found[f"mean.{i}"]),
                    "exp_avg_sq": torch.from_numpy(found[f"square.{i}"]),
                }
        return done

    def save(self, done: int) -> None:
        """Remember that so many steps are done."""
        if self._cache is None or self._key is None:
            return
        arrays = {"steps": np.asarray(done)}
        for i, parameter in enumerate(self._parameters):
            arrays[f"value.{i}"] = parameter.detach().numpy()
            state = self._adam.state.get(parameter)
            if state:
                arrays[f"step.{i}"] = np.asarray(float(state["step"]))
                arrays |= {f"mean.{i}": state["exp_avg"].numpy(), f"square.{i}": state["exp_avg_sq"].numpy()}
        self._cache.put(self._key, arrays)

    @property
    def _parameters(self) -> Sequence[torch.Tensor]:
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]
