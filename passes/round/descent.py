"""Gradient descent on what a twin can learn, a step at a time: the part that all learning passes share.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy.typing as npt
import torch


class Learner(Protocol):
    """What learning asks of a twin."""

    def parameters(self) -> Mapping[str, Sequence[torch.nn.Parameter]]:
        """What can be learned, by kind."""
        ...

    def step(self) -> AbstractContextManager[None]:
        """Samples may be run inside; the gradients of the parameters are there at the end."""
        ...

    def outputs(self, feed: Mapping[str, npt.NDArray[Any]]) -> tuple[torch.Tensor, ...]:
        """The outputs for a batch of inputs by name."""
        ...


class Descent:
    """Adam, descent by the signs of gradients, or another optimizer.

    Args:
        twin: whose parameters are learned.
        rates: of the kinds of parameters that the twin has; 0 or none: not learned.
        sign: every parameter moves by its rate against the sign of its gradient, instead of Adam.
        averages: Adam's decay of first and second moments.
        make: the optimizer of groups of parameters instead of these.

    Attributes:
        optimizer: None where nothing is learned.
    """

    def __init__(
        self,
        twin: Learner,
        rates: Mapping[str, float],
        *,
        sign: bool = False,
        averages: tuple[float, float] = (0.9, 0.999),
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    ) -> None:
        learned = {kind: found for kind, found in twin.parameters().items() if rates.get(kind)}
        self._twin, self._sign = twin, sign
        self._rates = [rates[kind] for kind in learned]
        self._parameters = [parameter for found in learned.values() for parameter in found]
        for parameter in self._parameters:
            parameter.requires_grad = True
        groups: list[dict[str, Any]] = [{"params": list(found)} for found in learned.values()]
        make = make or (torch.optim.SGD if sign else lambda params: torch.optim.Adam(params, betas=averages))
        self.optimizer: torch.optim.Optimizer | None = make(groups) if groups else None

    def step(self, loss: Callable[[int], torch.Tensor], samples: Sequence[int], share: float) -> bool:
        """One step along the mean gradient of some samples.

        Args:
            loss: of a sample, on the twin.
            samples: at least one.
            share: of the rates.

        Returns:
            Whether it was taken: without a finite gradient (outputs of integers, or that hold infinity) none is.
        """
        if self.optimizer is None:
            return False
        self.optimizer.zero_grad()
        with self._twin.step():
            for sample in samples:
                value = loss(int(sample)) / len(samples)
                if not value.requires_grad:  # no output is a float that depends on what is learned
                    return False
                value.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return False
        if self._sign:
            for gradient in gradients:
                gradient.sign_()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        return True
