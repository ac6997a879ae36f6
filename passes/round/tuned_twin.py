"""A quantized model as a differentiable twin whose ranges, scales and biases can be learned.

Only `tune` imports this file, since it needs torch. Activation grids pass gradients straight through their rounding;
the ends of a grid get the gradients of LSQ (Esser et al., "Learned Step Size Quantization", 2020) with a zero
point (Bhalgat et al., "LSQ+", 2020). The codes of the weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompiler.formats import PerTensor, QTensor, round_scale
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.fx_twin import fx_twin
from qcompiler.model import Model, StaticRange
from qcompiler.passes.round.quantized_values import Target, bounds_of
from qcompiler.passes.round.rows import block_count

Floats = npt.NDArray[np.float32]
_LEVELS = 255
_NARROWEST = 1e-6


class Grid(torch.nn.Module):
    """A static uint8 grid; `ends` holds how far its ends were moved, in shares of the first span."""

    def __init__(self, target: Target, start: StaticRange) -> None:
        super().__init__()
        self.target = target
        self._low, self._high = start.low, start.high
        self.ends = torch.nn.Parameter(torch.zeros(2))

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends; zero stays inside, and they stay within the bounds of the target."""
        moved = self.ends * (self._high - self._low)
        low = (self._low + moved[0]).clamp(max(self.target.low, -1e30), 0.0)
        return low, (self._high + moved[1]).clamp(_NARROWEST, max(min(self.target.high, 1e30), _NARROWEST))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round to the grid."""
        low, high = self.found()
        scale = (high - low) / _LEVELS
        zero = -low / scale
        quantize = torch.ops.aten._fake_quantize_learnable_per_tensor_affine  # LSQ's kernel has no public name
        return quantize(x, scale.reshape(1), zero.reshape(1), 0, _LEVELS, 1.0)


class Channels(torch.nn.Module):
    """A factor or a summand for each output channel, along one axis."""

    def __init__(self, rows: int, shape: tuple[int, ...], multiply: bool) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(rows))
        self._shape, self._multiply = shape, multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by 1 + value, or add value."""
        value = self.value.reshape(self._shape)
        return x * (1 + value) if self._multiply else x + value


class TunedTwin:
    """The twin of a rounded model.

    Args:
        model: float graph with codes and ranges beside it; bias shifts are started from.
        targets: of all values in `model.ranges`.

    Raises:
        MissingExtra, BadModel: as `fx_twin`.
    """

    def __init__(self, model: Model, targets: Sequence[Target]) -> None:
        copy = model.clone()
        sites = [s for s in find_sites(copy.ir) if s.name in model.weights]
        for site in sites:
            decoded = np.asarray(site.from_matrix(model.weights[site.name].decode()), np.float32)
            site.weight.const_value = ir.tensor(decoded, name=site.weight.name)
        self.module = fx_twin(copy.ir)
        self.module.requires_grad_(requires_grad=False)
        self._at = {node.meta["value"]: node for node in self.module.graph.nodes if "value" in node.meta}
        self.grids: dict[str, Grid] = {}
        self.shifts: dict[str, Channels] = {}
        self.factors: dict[str, Channels] = {}
        for site in (s for s in sites if s.op != "Gather" and block_count(s) in (1, s.groups)):
            self._add_channels(site, model.weights[site.name], model.bias_shift.get(site.name))
        values = {str(v.name): v for node in copy.graph for v in node.outputs}
        for target in targets:
            self._add_grid(target, values.get(str(target.value.name)), model.ranges)
        self.module.graph.eliminate_dead_code()
        self.module.recompile()

    def outputs(self, feed: Mapping[str, npt.NDArray[Any]], names: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """The graph's outputs for a batch whose inputs are called by these names."""
        return self.module(*(torch.from_numpy(np.asarray(feed[name])) for name in names))

    def commit(self, model: Model) -> None:
        """Write what was learned to the side tables of the model."""
        for name, grid in self.grids.items():
            low, high = (end.detach().item() for end in grid.found())
            model.ranges[name] = grid.target.grid(low, high)
        for name, shift in self.shifts.items():
            model.bias_shift[name] = shift.value.detach().numpy().copy()
        for name, factor in self.factors.items():
            tensor = model.weights[name]
            scale = tensor.scale * (1 + factor.value.detach().numpy()[:, None])
            scale = np.where(scale > 0, scale, tensor.scale).astype(np.float32)
            model.weights[name] = replace(tensor, scale=round_scale(scale, tensor.spec.scale_dtype))

    def _add_channels(self, site: Site, tensor: QTensor, start: Floats | None) -> None:
        if not isinstance(tensor.spec.granularity, PerTensor) and site.layout != "conv-transpose":
            shape = (1, -1) if site.layout == "columns-first" else (-1, *[1] * (len(site.shape) - 1))
            self.factors[site.name] = Channels(site.rows, shape, multiply=True)
            self._insert(str(site.weight.name), self.factors[site.name])
        shape = (-1, *[1] * (len(site.shape) - 2)) if site.layout.startswith("conv") else (-1,)
        shift = self.shifts[site.name] = Channels(site.rows, shape, multiply=False)
        if start is not None:
            shift.value.data = torch.from_numpy(np.array(start, np.float32))
        for user in (u for u in site.users if u.op_type != "Gather"):
            self._insert(str(user.outputs[0].name), shift)

    def _add_grid(self, target: Target, value: ir.Value | None, ranges: Mapping[str, StaticRange]) -> None:
        name = str(target.value.name)
        like = None if target.like is None else str(target.like.name)
        self.grids[name] = Grid(target, ranges[name]) if like is None else self.grids[like]
        producer = None if value is None else value.producer()
        # The grid holds nothing that a Relu or Clip in front of it would cut off, so that is left out: it costs time.
        absorbed = None if producer is None or bounds_of(producer) is None else producer.inputs[0]
        inner = None if absorbed is None else self._at.get(str(absorbed.name))
        self._insert(name, self.grids[name], inner)

    def _insert(self, name: str, module: torch.nn.Module, source: torch.fx.Node | None = None) -> None:
        """Pass a value through a module, for all its readers."""
        node = self._at[name]
        key = f"tuned_{len(list(self.module.children()))}"
        self.module.add_submodule(key, module)
        with self.module.graph.inserting_after(node):
            made = self.module.graph.call_module(key, (source or node,))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self._at[name] = made
