"""A quantized model as a differentiable twin whose weights, activation ranges and biases can be learned.

Only passes that learn import this file when they run, since it needs torch. Activation grids pass gradients straight
through their rounding; the ends of a grid get the gradients of LSQ (Esser et al., "Learned Step Size Quantization",
2020) with a zero point (Bhalgat et al., "LSQ+", 2020).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompiler.capture.normalize import root_cause
from qcompiler.errors import BadModel
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.fx_twin import fx_twin
from qcompiler.measure.segments import Segments
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.bias import has_bias
from qcompiler.passes.round.learned_weights import Codes, LearnedWeight
from qcompiler.passes.round.quantized_values import Target, bounds_of
from qcompiler.passes.round.recomputed import recomputed
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


class Shift(torch.nn.Module):
    """A summand for each output channel."""

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(rows))
        self._shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return x + self.value.reshape(self._shape)


class TunedTwin:
    """The twin of a rounded model.

    Args:
        model: float graph with codes and ranges beside it; bias shifts are started from.
        targets: of all values in `model.ranges`.
        codes: how the codes of weights are learned beside their scales.

    Attributes:
        weights: by site. grids: by activation value. shifts: by site, where a bias is there to take them.

    Raises:
        MissingExtra, BadModel: as `fx_twin`.
    """

    def __init__(self, model: Model, targets: Sequence[Target], codes: Codes = "fixed") -> None:
        sites = [s for s in find_sites(model.ir) if s.name in model.weights]
        self.module = fx_twin(model.ir)
        self.module.requires_grad_(requires_grad=False)
        self._inputs = [str(value.name) for value in model.graph.inputs if value.const_value is None]
        # An activation grid's steps are no finer than bfloat16: only what has none is computed in it.
        self._narrow = not model.ranges and _has_fast_bfloat16()
        self._at = {node.meta["value"]: node for node in self.module.graph.nodes if "value" in node.meta}
        self.weights = {site.name: self._learned(model, site, codes) for site in sites}
        self.grids: dict[str, Grid] = {}
        self.shifts: dict[str, Shift] = {}
        for site in (s for s in sites if s.op != "Gather" and block_count(s) in (1, s.groups)):
            if site.name in model.bias_shift or has_bias(site):
                self._add_shift(site, model.bias_shift.get(site.name))
        values = {str(v.name): v for node in model.graph for v in node.outputs}
        for target in targets:
            self._add_grid(target, values.get(str(target.value.name)), model.ranges)
        self.module.graph.eliminate_dead_code()
        self.module.recompile()
        self.module = recomputed(self.module, {n: s.index for s in Segments(model.ir) for n in s.made})

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """What can be learned: "scale", "code", "range" and "bias" -> parameters, those that there are."""
        learned = self.weights.values()
        found = {
            "scale": [weight.factor for weight in learned],
            "code": [weight.codes.parameter for weight in learned if weight.codes is not None],
            "range": [grid.ends for grid in dict.fromkeys(self.grids.values())],
            "bias": [shift.value for shift in self.shifts.values()],
        }
        return {kind: parameters for kind, parameters in found.items() if parameters}

    @contextmanager
    def step(self) -> Generator[None]:
        """Samples may be run inside; the weights are those learned so far, their gradients are there at the end."""
        for weight in self.weights.values():
            weight.fill()
        yield
        for weight in self.weights.values():
            weight.collect()

    def outputs(self, feed: Mapping[str, npt.NDArray[Any]]) -> tuple[torch.Tensor, ...]:
        """The graph's outputs for a batch of its inputs by name; inside `step` only.

        Raises:
            BadModel: an operation has no differentiable form with these inputs or attributes.
        """
        inputs = [torch.from_numpy(np.asarray(feed[name])) for name in self._inputs]
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._narrow):
                return self.module(*inputs)
        except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
            what = f"its differentiable form does not run ({root_cause(error)})"
            raise BadModel(what, fix="use passes without gradients, or --effort low") from error

    def commit(self, model: Model) -> None:
        """Write what was learned to the side tables of the model."""
        for name, grid in self.grids.items():
            low, high = (end.detach().item() for end in grid.found())
            model.ranges[name] = grid.target.grid(low, high)
        for name, shift in self.shifts.items():
            if name in model.bias_shift or shift.value.any():  # no zeros where no bias was learned
                model.bias_shift[name] = shift.value.detach().numpy().copy()
        for name, weight in self.weights.items():
            model.weights[name] = weight.result()

    def _learned(self, model: Model, site: Site, codes: Codes) -> LearnedWeight:
        parameter = getattr(self.module, str(self._at[str(site.weight.name)].target))
        if self._narrow and all(user.op_type in ("MatMul", "Gemm") for user in site.users):
            parameter.data = parameter.data.to(torch.bfloat16)  # what it is cast to for every product
        return LearnedWeight(site, model.weights[site.name], parameter, codes)

    def _add_shift(self, site: Site, start: Floats | None) -> None:
        shape = (-1, *[1] * (len(site.shape) - 2)) if site.layout.startswith("conv") else (-1,)
        shift = self.shifts[site.name] = Shift(site.rows, shape)
        if start is not None:
            shift.value.data = torch.from_numpy(np.array(start, np.float32))
        for user in (u for u in site.users if u.op_type != "Gather"):
            self._insert(str(user.outputs[0].name), shift)

    def _add_grid(self, target: Target, value: ir.Value | None, ranges: Mapping[str, StaticRange]) -> None:
        name = str(target.value.name)
        if not np.isfinite((ranges[name].low, ranges[name].high)).all():
            raise BadModel(f"the range of '{name}' is infinite, and so has no gradient", name, "repair the data")
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


def _has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 are several times faster here than those of float32 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())  # type: ignore[reportPrivateUsage] # torch has no public name
