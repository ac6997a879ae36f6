"""A quantized model as a differentiable twin whose weights, activation ranges and biases can be learned.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompiler.errors import BadModel
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.bias import has_bias
from qcompiler.passes.round.learned_weights import Codes, LearnedWeight
from qcompiler.passes.round.learning_twin import Grid, LearningTwin
from qcompiler.passes.round.quantized_values import Target
from qcompiler.passes.round.rows import block_count
from qcompiler.passes.round.streams import narrow_rows

Floats = npt.NDArray[np.float32]


class Shift(torch.nn.Module):
    """A summand for each output channel."""

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(rows))
        self._shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return x + self.value.reshape(self._shape)


class TunedTwin(LearningTwin):
    """The twin of a rounded model.

    Args:
        model: float graph with codes and ranges beside it; bias shifts are started from.
        targets: of all values in `model.ranges`.
        codes: how the codes of weights are learned beside their scales.

    Attributes:
        weights: by site. grids: by activation value. shifts: by site, where a bias is there to take them,
            and by the norm's output where a norm has one.

    Raises:
        MissingExtra, BadModel: as `fx_twin`.
    """

    def __init__(self, model: Model, targets: Sequence[Target], codes: Codes = "fixed") -> None:
        rows = narrow_rows(model.plan)
        # An activation grid's steps are no finer than bfloat16: only what has none is computed in it.
        super().__init__(model, narrow=not model.ranges and not rows)
        sites = [s for s in find_sites(model.ir) if s.name in model.weights]
        self.weights = {site.name: self._learned(model, site, codes) for site in sites}
        self.grids: dict[str, Grid] = {}
        self.shifts: dict[str, Shift] = {}
        for site in (s for s in sites if s.op != "Gather" and block_count(s) in (1, s.groups)):
            if site.name in model.bias_shift or has_bias(site):
                self._add_shift(site, model.bias_shift.get(site.name))
        values = {str(v.name): v for node in model.graph for v in node.outputs}
        known = {site.name for site in find_sites(model.ir)}
        for name, start in ((n, s) for n, s in model.bias_shift.items() if n not in known):  # behind norms
            shift = self.shifts[name] = Shift(len(start), (-1,))
            shift.value.data = torch.from_numpy(np.array(start, np.float32))
            self.insert(name, shift)
        for site in (s for s in sites if s.name in rows):
            self.insert_rows(site, rows[site.name])
        for target in targets:
            self._add_grid(target, values.get(str(target.value.name)), model.ranges)
        self.close(model)

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
        parameter = getattr(self.module, str(self.node(str(site.weight.name)).target))
        if self.narrow and all(user.op_type in ("MatMul", "Gemm") for user in site.users):
            parameter.data = parameter.data.to(torch.bfloat16)  # what it is cast to for every product
        return LearnedWeight(site, model.weights[site.name], parameter, codes)

    def _add_shift(self, site: Site, start: Floats | None) -> None:
        shape = (-1, *[1] * (len(site.shape) - 2)) if site.layout.startswith("conv") else (-1,)
        shift = self.shifts[site.name] = Shift(site.rows, shape)
        if start is not None:
            shift.value.data = torch.from_numpy(np.array(start, np.float32))
        for user in (u for u in site.users if u.op_type != "Gather"):
            self.insert(str(user.outputs[0].name), shift)

    def _add_grid(self, target: Target, value: ir.Value | None, ranges: Mapping[str, StaticRange]) -> None:
        name = str(target.value.name)
        if not np.isfinite((ranges[name].low, ranges[name].high)).all():
            raise BadModel(f"the range of '{name}' is infinite, and so has no gradient", name, "repair the data")
        like = None if target.like is None else str(target.like.name)
        self.grids[name] = Grid(target, ranges[name]) if like is None else self.grids[like]
        self.insert_grid(target, value, self.grids[name])
