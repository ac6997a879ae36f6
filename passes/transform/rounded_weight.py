"""A float weight on its way to the twin: rounded as the plan says, with gradients for the weight and for its range.

Only `transformed_twin` imports this file, since it needs torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.formats import PerTensor, QTensor, QuantSpec, round_scale
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import encode, fit, quantize
from qcompiler.formats.promoted import Promoted
from qcompiler.graph.sites import Site

_NARROWEST, _WIDEST = 0.05, 1.1  # of the range of a group; scales of least squared error may be a little wider
_FAR = np.float32(1e9)  # steps: beyond every grid


class RoundedWeight:
    """Rounds the weight of one site to the nearest codes, as often as it is called.

    A group's grid spans a share of the group's range, which can be learned (MobileQuant's and OmniQuant's learned
    clipping). Gradients pass straight through the rounding; where the scale matters they are those of LSQ, and go on to
    the share and to the group's largest weight, which the scale hangs on. Formats of two widths and other ways of
    sharing scales have neither: only their rounding is seen.

    Args:
        site: in whose layout tensors come.
        spec: how it will be stored.
        matrix: float32 [rows, columns], where the share begins: at the clipping of least squared error.

    Attributes:
        share: parameter [scale rows, groups] (MobileQuant has its logit, and so never the whole range); None where it
            is not learned.
    """

    def __init__(self, site: Site, spec: QuantSpec, matrix: Floats) -> None:
        self.site, self.spec = site, spec
        self.share: torch.nn.Parameter | None = None
        if self._is_plain(matrix.shape):
            self.share = torch.nn.Parameter(torch.zeros(spec.granularity.grid(*matrix.shape)))
            self.begin(matrix)

    @torch.no_grad()
    def begin(self, matrix: Floats) -> None:
        """Set the share to where the rounding of a matrix [rows, columns] has the least squared error."""
        if self.share is not None:
            clipped, whole = (fit(matrix, self.spec, method)[0] for method in ("mse", "minmax"))
            self.share.copy_(torch.from_numpy(clipped / whole))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rounded weight, in the layout of the site."""
        found: Any = _Rounding.apply(tensor, self.share, self)
        return found

    def codes(self, matrix: Floats) -> QTensor:
        """A matrix [rows, columns] as it will be stored, with the present share."""
        if self.share is None:
            return quantize(matrix, self.spec, "minmax")
        scale, zero = self.grid(self._blocks(matrix))
        return encode(matrix, self.spec, scale[..., 0], None if zero is None else zero[..., 0])

    def blocks(self, tensor: torch.Tensor) -> Floats:
        """[scale rows, groups, size]: a tensor in the layout of the site by what shares a scale; zeros at the end."""
        return self._blocks(self.site.to_matrix(tensor.detach().float().numpy()))

    def _blocks(self, matrix: Floats) -> Floats:
        rows, columns = matrix.shape
        grid = self.spec.granularity.grid(rows, columns)
        if isinstance(self.spec.granularity, PerTensor):
            return matrix.reshape(1, 1, -1)
        missing = grid[1] * self.spec.granularity.group_size(columns) - columns
        return np.pad(matrix, ((0, 0), (0, missing))).reshape(*grid, -1)

    def tensor(self, blocks: Floats) -> torch.Tensor:
        """The inverse of `blocks`."""
        rows, columns = self.site.rows, self.site.columns
        matrix = np.ascontiguousarray(blocks.reshape(rows, -1)[:, :columns], np.float32)
        return torch.from_numpy(np.ascontiguousarray(self.site.from_matrix(matrix)))

    def grid(self, blocks: Floats) -> tuple[Floats, Floats | None]:
        """Scales and zero points [scale rows, groups, 1] for the present share."""
        assert self.share is not None
        share = self.share.detach().clamp(_NARROWEST, _WIDEST).numpy()[..., None]
        low, high = (np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0))
        scale, zero = self.spec.format.fit(low * share, high * share, self.spec.symmetric)
        return round_scale(scale, self.spec.scale_dtype), zero

    def round(self, blocks: Floats, scale: Floats, zero: Floats | None) -> Floats:
        """The numbers of the nearest codes."""
        form = self.spec.format
        return form.decode(form.encode(blocks, scale, zero), scale, zero)

    def _is_plain(self, shape: tuple[int, ...]) -> bool:
        """Whether a scale belongs to consecutive columns of a row, or to all, and formats are of one width."""
        granularity, (rows, columns) = self.spec.granularity, shape
        per_row = (rows, -(-columns // granularity.group_size(columns)))
        plain = isinstance(granularity, PerTensor) or granularity.grid(rows, columns) == per_row
        return plain and self.spec.format.free_scales and not isinstance(self.spec.format, Promoted)


class _Rounding(torch.autograd.Function):
    """Of a tensor in the layout of a site, through the blocks of its format."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, share: torch.Tensor | None, weight: RoundedWeight) -> torch.Tensor:
        ctx.weight = weight
        if share is None:
            matrix = np.ascontiguousarray(weight.site.to_matrix(tensor.detach().float().numpy()))
            found = quantize(matrix, weight.spec, "minmax").decode()
            return torch.from_numpy(np.ascontiguousarray(weight.site.from_matrix(found)))
        ctx.save_for_backward(tensor, share)
        blocks = weight.blocks(tensor)
        return weight.tensor(weight.round(blocks, *weight.grid(blocks)))

    @staticmethod
    def backward(ctx: Any, *passed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        weight: RoundedWeight = ctx.weight
        if not ctx.saved_tensors:
            return passed[0], None, None
        tensor, share = ctx.saved_tensors
        blocks, gradient = weight.blocks(tensor), weight.blocks(passed[0])
        scale, zero = weight.grid(blocks)
        lowest, highest = (weight.round(side * _FAR * scale, scale, zero) for side in (np.float32(-1), np.float32(1)))
        inside = (blocks > lowest - scale / 2) & (blocks < highest + scale / 2)
        slopes = weight.round(blocks, scale, zero) - blocks * inside
        per_scale = np.einsum("abc,abc->ab", gradient, slopes)[..., None]  # times the scale
        found = gradient * inside
        _to_the_ends(found, blocks, per_scale, symmetric=weight.spec.symmetric)
        per_share = torch.from_numpy(np.asarray(per_scale[..., 0], np.float32)) / share.clamp(_NARROWEST, _WIDEST)
        return weight.tensor(found), per_share, None


def _to_the_ends(found: Floats, blocks: Floats, per_scale: npt.NDArray[Any], *, symmetric: bool) -> None:
    """Add what the scale passes on to the weights that it is proportional to: the ends of the range."""
    if symmetric:
        place = np.abs(blocks).argmax(-1, keepdims=True)
        end = np.take_along_axis(blocks, place, -1)
        _add(found, place, np.divide(per_scale, end, out=np.zeros_like(end), where=end != 0))
        return
    places = blocks.argmax(-1, keepdims=True), blocks.argmin(-1, keepdims=True)
    high, low = (np.take_along_axis(blocks, place, -1) for place in places)
    span = np.maximum(high, 0) - np.minimum(low, 0)
    share = np.divide(per_scale, span, out=np.zeros_like(span), where=span > 0)
    _add(found, places[0], np.where(high > 0, share, 0))
    _add(found, places[1], np.where(low < 0, -share, 0))


def _add(array: Floats, place: npt.NDArray[np.int64], amount: npt.NDArray[Any]) -> None:
    np.put_along_axis(array, place, np.take_along_axis(array, place, -1) + amount, -1)
