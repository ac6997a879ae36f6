"""`Model`: the ONNX IR graph with the side tables that passes fill.

Until `InsertQDQ` the graph is always the *float* model: transforms rewrite it into an equal function, while
plans, codes and corrections live in the tables beside it. `InsertQDQ` commits the tables to the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.formats import QTensor
from qcompiler.plan import Plan

if TYPE_CHECKING:
    from qcompiler.calibration import Calibration
    from qcompiler.measure.cache import Cache


@dataclass(frozen=True)
class StaticRange:
    """A calibrated activation range: uint8 codes, x = (code - zero) * scale, per tensor."""

    scale: float
    zero: int

    @property
    def low(self) -> float:
        """Smallest representable value."""
        return (0 - self.zero) * self.scale

    @property
    def high(self) -> float:
        """Largest representable value."""
        return (255 - self.zero) * self.scale


@dataclass
class Model:
    """A model on its way through the passes.

    Attributes:
        ir: the graph. Float until lowered.
        name: stem of the artifact's name.
        calibration: data that measurements may use; None only for passes that need none.
        cache: content-addressed store of long measurements.
        plan: the decisions of allocation.
        weights: site name -> codes, filled by rounding.
        bias_shift: site name -> float32 [rows], added to the operation's output (bias correction); or the name of a
            norm's output -> float32 [channels], added to it.
        ranges: activation value name -> calibrated static range.
        lowered: True after InsertQDQ; from then on the graph itself holds the quantization.
        workdir: private folder for captured files; removed with the model's owner.
    """

    ir: ir.Model
    name: str = "model"
    calibration: Calibration | None = None
    cache: Cache | None = None
    plan: Plan = field(default_factory=Plan)
    weights: dict[str, QTensor] = field(default_factory=dict[str, QTensor])
    bias_shift: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict[str, npt.NDArray[np.float32]])
    ranges: dict[str, StaticRange] = field(default_factory=dict[str, StaticRange])
    lowered: bool = False
    workdir: Path | None = None

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.ir.graph

    def parts(self) -> tuple[list[ir.Node], dict[str, ir.TensorProtocol | None]]:
        """The nodes and tensors that the graph is made of, equal if they are the same ones: transforms replace them."""
        return list(self.graph), {name: value.const_value for name, value in self.graph.initializers.items()}

    def clone(self) -> Model:
        """A copy whose graph and tables can be changed freely; tensors are shared."""
        return Model(
            self.ir.clone(), self.name, self.calibration, self.cache, self.plan, dict(self.weights),
            dict(self.bias_shift), dict(self.ranges), self.lowered, self.workdir,
        )  # fmt: skip
