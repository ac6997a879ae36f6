"""How far a twin's outputs are from the float model's, differentiable: the losses of `measure.loss`.

Only passes that learn import this file, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.measure.loss import Kind, output_kind

_ROWS = 64  # worked on at a time: a row of a language model has 50,000 classes
_TINY = 1e-12


def distance(
    outputs: Sequence[torch.Tensor], wanted: Sequence[npt.NDArray[Any]], kinds: Sequence[Kind | None] = ()
) -> torch.Tensor:
    """Sum over the float outputs: mean KL divergence of a row in nats for class scores, else ||y - r||^2 / ||r||^2.

    Args:
        outputs: of the twin, of any float type.
        wanted: of the float model, in the same shapes.
        kinds: how to judge each of them; None, and all without any: by `loss.output_kind`.
    """
    total = torch.zeros(())
    for output, exact, kind in zip(outputs, wanted, kinds or [None] * len(wanted), strict=True):
        if not np.issubdtype(exact.dtype, np.floating):
            continue
        kind, goal = kind or output_kind(exact), torch.from_numpy(exact)
        if kind == "values":
            total = total + (output - goal).square().sum() / goal.square().sum().clamp(min=1e-30)
        elif kind == "probabilities":
            total = total + _divergence(output.float().clamp(min=_TINY).log(), goal.float().clamp(min=_TINY).log())
        else:
            total = total + _divergence(output, goal)
    return total


def _divergence(output: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    result: Any = _Divergence.apply(output.reshape(-1, output.shape[-1]), goal.reshape(-1, goal.shape[-1]))
    return result


class _Divergence(torch.autograd.Function):
    """Mean KL(softmax(goal) || softmax(output)) of a row; its gradient, (q - p) / rows, is found on the way."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        gradient, total = torch.empty_like(output), 0.0
        for first in range(0, len(output), _ROWS):
            rows = slice(first, first + _ROWS)
            found, exact = (torch.log_softmax(z[rows].float(), -1) for z in (output, goal))
            p = exact.exp()
            total += (p * (exact - found)).sum(dtype=torch.float64).item()
            gradient[rows] = found.exp_().sub_(p).div_(len(output))
        ctx.save_for_backward(gradient)
        return torch.tensor(total / max(len(output), 1))

    @staticmethod
    def backward(ctx: Any, *passed: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * passed[0], None
