"""Descent on orthogonal matrices: every step is itself a rotation.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


class CayleySGD(torch.optim.Optimizer):
    """X -> (I - a/2 W)^-1 (I + a/2 W) X with W = 1/2 (X G^T - G X^T), the skew part of the gradient G at X.

    Where Li et al. ("Efficient Riemannian optimization on the Stiefel manifold", 2002.01113) and SpinQuant iterate
    five times, the system is solved. They take a = min(rate, 1 / |W|_1), which hangs on the unit of the loss; here a is
    the rate over the spectral norm of W, so that a step turns no plane by more than about the rate, in radians.

    Args:
        groups: of square matrices [n, n], orthogonal, with "lr".
        fixed: matrices that map the vector of ones to itself, and go on doing so.
    """

    def __init__(self, groups: list[dict[str, Any]], fixed: Collection[torch.nn.Parameter] = ()) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._fixed = {id(matrix) for matrix in fixed}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not used."""
        del closure
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    matrix.copy_(self._turned(matrix, float(group["lr"])))

    def _turned(self, matrix: torch.nn.Parameter, rate: float) -> torch.Tensor:
        x, gradient = matrix.double(), (matrix.grad if matrix.grad is not None else torch.zeros(())).double()
        downhill = x @ gradient.T - gradient @ x.T
        if id(matrix) in self._fixed:  # the mean of the channels takes no part
            downhill = downhill - downhill.mean(0, keepdim=True)
            downhill = downhill - downhill.mean(1, keepdim=True)
        size = torch.linalg.matrix_norm(downhill, 2)
        if size == 0:
            return x
        half, one = downhill * (rate / size / 2), torch.eye(len(x), dtype=x.dtype)
        found = torch.linalg.solve(one - half, (one + half) @ x)
        return 1.5 * found - 0.5 * found @ (found.T @ found)  # what float32 has lost of orthogonality
