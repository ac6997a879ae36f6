"""Codes of integer formats that gradient descent can change, in two ways.

`StraightCodes` rounds a position on every step and lets gradients pass (Bengio et al., 2013): AdaQuant and AutoRound.
`SoftCodes` lies between two neighbouring codes and is pressed towards one of them (AdaRound).

Only `learned_weights` imports this file, since it needs torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.formats.base import Floats

_EDGE = 0.4  # how far from its code, in steps, a position begins at most: the boundary lies at half a step
_STRETCH = (-0.1, 1.1)  # AdaRound's sigmoid reaches 0 and 1
_BETA, _PRESSURE = (20.0, 2.0), 100.0
_INSIDE = 0.01  # the least distance of a fraction from 0 and 1 in the beginning, where the sigmoid still has a slope


class LearnedCodes(Protocol):
    """What a learned weight asks of its codes."""

    parameter: torch.nn.Parameter

    def present(self) -> Floats:
        """The codes that the twin computes with: [rows, columns], perhaps no whole numbers."""
        ...

    def final(self) -> npt.NDArray[Any]:
        """The codes that are stored."""
        ...

    def press(self, share: float) -> None:
        """Towards whole numbers: a share from 0, not at all, to 1."""
        ...

    def collect(self, gradient: Floats) -> None:
        """Set the parameter's gradient from that of the codes, [rows, columns]."""
        ...


class StraightCodes:
    """The nearest codes of positions [rows, columns], which are in units of codes.

    Args:
        exact: where the float weights lie; a position begins there, or as near to it as its code allows.
        codes: to begin with.
        limits: the smallest and the largest code.
    """

    def __init__(self, exact: Floats, codes: npt.NDArray[Any], limits: tuple[int, int]) -> None:
        self._limits, self._type = limits, codes.dtype
        begin = np.clip(exact, codes - np.float32(_EDGE), codes + np.float32(_EDGE))
        self.parameter = torch.nn.Parameter(torch.from_numpy(begin))

    def present(self) -> Floats:
        """The nearest codes."""
        return self.parameter.detach().round().clamp_(*self._limits).numpy()

    def final(self) -> npt.NDArray[Any]:
        """The same as integers."""
        return self.present().astype(self._type)

    def press(self, share: float) -> None:
        """They are whole numbers."""

    def collect(self, gradient: Floats) -> None:
        """The gradient itself; none where a position is off the grid."""
        low, high = self._limits
        inside = (self.parameter > low - 0.5) & (self.parameter < high + 0.5)
        self.parameter.grad = torch.from_numpy(np.ascontiguousarray(gradient)) * inside


class SoftCodes:
    """The code below a weight plus a fraction h = clip(1.2 sigmoid(v) - .1, 0, 1), which is learned.

    AdaRound adds lambda sum(1 - |2h - 1|^beta) to the loss, beta falling from 20 to 2. Here the gradient of that sum is
    in units of the root mean square of the loss's own, so that no lambda has to fit the units of the loss.

    Args:
        exact: where the float weights lie, in units of codes.
        codes: to begin with (the fraction is that of `exact`, between the code and its neighbour on that side).
        limits: the smallest and the largest code.
    """

    def __init__(self, exact: Floats, codes: npt.NDArray[Any], limits: tuple[int, int]) -> None:
        self._limits, self._type = limits, codes.dtype
        near = np.clip(exact, codes.astype(np.float32) - 0.5, codes.astype(np.float32) + 0.5)
        self._below = np.minimum(np.floor(near), limits[1] - 1).astype(np.float32)
        h = np.clip(near - self._below, _INSIDE, 1 - _INSIDE)
        low, high = _STRETCH
        share = (h - low) / (high - low)
        self.parameter = torch.nn.Parameter(torch.from_numpy(np.log(share / (1 - share)).astype(np.float32)))
        self._share = 0.0

    def present(self) -> Floats:
        """Code below plus fraction, on the grid."""
        return np.clip(self._below + self._fraction().numpy(), *self._limits)

    def final(self) -> npt.NDArray[Any]:
        """Fractions of a half and more go up."""
        up = self._fraction().numpy() >= 0.5
        return np.clip(self._below + up, *self._limits).astype(self._type)

    def press(self, share: float) -> None:
        """Towards 0 and 1, from the next `collect` on."""
        self._share = share

    def collect(self, gradient: Floats) -> None:
        """By the chain rule, and the regulariser's."""
        low, high = _STRETCH
        sigmoid = torch.sigmoid(self.parameter.detach())
        raw = sigmoid * (high - low) + low
        slope = sigmoid * (1 - sigmoid) * (high - low) * ((raw > 0) & (raw < 1))
        wanted = torch.from_numpy(np.ascontiguousarray(gradient))
        if self._share:
            beta = _BETA[0] + (_BETA[1] - _BETA[0]) * self._share
            centred = 2 * raw.clamp(0, 1) - 1
            push = -centred.sign() * centred.abs() ** (beta - 1)
            wanted = wanted + _PRESSURE * self._share * wanted.square().mean().sqrt() * push
        self.parameter.grad = wanted * slope

    def _fraction(self) -> torch.Tensor:
        low, high = _STRETCH
        return (torch.sigmoid(self.parameter.detach()) * (high - low) + low).clamp_(0, 1)
