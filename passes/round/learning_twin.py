"""A model's differentiable twin with modules put in behind values: what all twins that learn have in common.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompiler.capture.normalize import root_cause
from qcompiler.errors import BadModel
from qcompiler.graph.rows import row_limit
from qcompiler.graph.sites import Site
from qcompiler.measure.fx_twin import fx_twin
from qcompiler.measure.segments import Segments
from qcompiler.model import Model, StaticRange
from qcompiler.passes.round.quantized_values import Target, bounds_of
from qcompiler.passes.round.recomputed import recomputed
from qcompiler.plan import SitePlan

_LEVELS = 255
_NARROWEST = 1e-6


class Grid(torch.nn.Module):
    """A static uint8 grid; `ends` holds how far its ends were moved, in shares of its span.

    Gradients pass straight through the rounding; the ends get those of LSQ (Esser et al., "Learned Step Size
    Quantization", 2020) with a zero point (Bhalgat et al., "LSQ+", 2020).
    """

    def __init__(self, target: Target, start: StaticRange) -> None:
        super().__init__()
        self.target = target
        self._start = torch.tensor([start.low, start.high])
        self.ends = torch.nn.Parameter(torch.zeros(2))

    def base(self) -> torch.Tensor:
        """[2]: the ends before they are moved."""
        return self._start

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends; zero stays inside, and they stay within the bounds of the target."""
        base = self.base()
        moved = base + self.ends * (base[1] - base[0])
        low = moved[0].clamp(max(self.target.low, -1e30), 0.0)
        return low, moved[1].clamp(_NARROWEST, max(min(self.target.high, 1e30), _NARROWEST))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round to the grid."""
        low, high = self.found()
        scale = (high - low) / _LEVELS
        zero = -low / scale
        quantize = torch.ops.aten._fake_quantize_learnable_per_tensor_affine  # LSQ's kernel has no public name
        return quantize(x, scale.reshape(1), zero.reshape(1), 0, _LEVELS, 1.0)


class Rows(torch.nn.Module):
    """Symmetric grids of rows that are fixed at run time (`graph.rows`); gradients also pass through their scales."""

    def __init__(self, plan: SitePlan) -> None:
        super().__init__()
        self._limit, self._clip = row_limit(plan.activation_bits), plan.activation_clip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round every row to its grid."""
        scale = x.abs().amax(-1, keepdim=True) * (self._clip / self._limit)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        ratio = x / scale
        codes = ratio + (ratio.round() - ratio).detach()
        return codes.clamp(-self._limit, self._limit) * scale


class LearningTwin:
    """The twin of a float model, its parameters frozen.

    Args:
        model: whose graph is meant.
        narrow: products may be computed in bfloat16 where that is fast.

    Attributes:
        module: the twin.
        narrow: whether they are.

    Raises:
        MissingExtra, BadModel: as `fx_twin`.
    """

    def __init__(self, model: Model, *, narrow: bool) -> None:
        self.module = fx_twin(model.ir)
        self.module.requires_grad_(requires_grad=False)
        self.narrow = narrow and _has_fast_bfloat16()
        self._inputs = [str(value.name) for value in model.graph.inputs if value.const_value is None]
        self._makers = {node.meta["value"]: node for node in self.module.graph.nodes if "value" in node.meta}
        self._at = dict(self._makers)
        self._count = 0

    def outputs(self, feed: Mapping[str, npt.NDArray[Any]]) -> tuple[torch.Tensor, ...]:
        """The graph's outputs for a batch of its inputs by name; inside `step` only.

        Raises:
            BadModel: an operation has no differentiable form with these inputs or attributes.
        """
        inputs = [torch.tensor(feed[name]) for name in self._inputs]
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
                return self.module(*inputs)
        except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
            what = f"its differentiable form does not run ({root_cause(error)})"
            raise BadModel(what, fix="use passes without gradients, or --effort low") from error

    def node(self, name: str) -> torch.fx.Node:
        """The node of the twin that makes a value of the graph, with what was inserted behind it."""
        return self._at[name]

    def insert(
        self,
        name: str,
        module: torch.nn.Module,
        source: torch.fx.Node | None = None,
        readers: frozenset[str] | None = None,
    ) -> None:
        """Pass a value through a module.

        Args:
            name: of the value.
            module: put in behind it.
            source: read this node instead of the value's own.
            readers: for those operations only that make these values; for all, also later ones, if None.
        """
        node = self._at[name]
        key = f"inserted_{self._count}"  # children are no count: one module may stand behind several values
        self._count += 1
        self.module.add_submodule(key, module)
        with self.module.graph.inserting_after(node):
            made = self.module.graph.call_module(key, (source or node,))
        chosen = None if readers is None else {self._makers[reader] for reader in readers}
        node.replace_all_uses_with(
            made, delete_user_cb=lambda user: user is not made and (chosen is None or user in chosen)
        )
        if readers is None:
            self._at[name] = made

    def insert_rows(self, site: Site, plan: SitePlan) -> None:
        """Round the rows that the products of a site read."""
        for user in (u for u in site.users if u.op_type in ("MatMul", "Gemm") and u.inputs[0] is not None):
            self.insert(str(user.inputs[0].name), Rows(plan), readers=frozenset({str(user.outputs[0].name)}))  # type: ignore[union-attr]

    def insert_grid(self, target: Target, value: ir.Value | None, grid: Grid) -> None:
        """Put a grid behind the value of its target.

        The grid holds nothing that a Relu or Clip in front of it would cut off, so that is left out: it costs time.
        """
        producer = None if value is None else value.producer()
        absorbed = None if producer is None or bounds_of(producer) is None else producer.inputs[0]
        inner = None if absorbed is None else self._at.get(str(absorbed.name))
        self.insert(str(target.value.name), grid, inner)

    def close(self, model: Model) -> None:
        """Nothing is inserted after this: the twin is cut into parts that are computed again when they are needed."""
        self.module.graph.eliminate_dead_code()
        self.module.recompile()
        self.module = recomputed(self.module, {n: s.index for s in Segments(model.ir) for n in s.made})


def _has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 are several times faster here than those of float32 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())  # type: ignore[reportPrivateUsage] # torch has no public name
