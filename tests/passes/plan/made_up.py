"""A small model, a made-up target and made-up losses, for tests of passes that plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler import registry
from qcompiler.formats import Int, PerGroup, QuantSpec
from qcompiler.graph.sites import Site
from qcompiler.measure.sensitivity import Sensitivity
from qcompiler.model import Model
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import Menu
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress, Silent
from qcompiler.target import Compiled, Runnable


def model() -> Model:
    """q, k, v read x; their sum (k and v padded by Concat) goes through out and wide."""
    rng = np.random.default_rng(0)
    shapes = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "out": (64, 64), "wide": (64, 256)}
    arrays = {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    arrays["shift"] = rng.normal(size=64).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", f"{n}.weight"], [n], name=n) for n in "qkv"]
    nodes += [
        helper.make_node("Concat", ["k", "v"], ["kv"], axis=-1, name="concat"),
        helper.make_node("Add", ["q", "kv"], ["sum"], name="sum"),
        helper.make_node("Add", ["sum", "shift"], ["sum2"], name="shift_it"),
        helper.make_node("MatMul", ["sum2", "out.weight"], ["o"], name="out"),
        helper.make_node("MatMul", ["o", "wide.weight"], ["y"], name="wide"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Model(ir.from_proto(proto), name="attention")


@dataclass
class Target:
    """Groups of 32, dynamic activations first; nothing of 7 bits; what `float_sites` names stays float."""

    name: str = "made-up"
    float_sites: tuple[str, ...] = ()
    ties: str = "none"

    def candidates(self, site: Site, bits: Sequence[int]) -> list[SitePlan]:
        if site.name in self.float_sites:
            return []
        specs = [QuantSpec(Int(b), PerGroup(32)) for b in bits if b != 7]
        return [SitePlan(s, a) for s in specs for a in ("dynamic", "float")]  # type: ignore[arg-type]

    def supports(self, site: Site, plan: SitePlan) -> str | None:
        if site.name in self.float_sites:
            return "it has no kernel for this"
        if plan.activation == "static":
            return "it has no static kernels"
        return None

    def compile(self, model: Model, folder: Path, progress: Progress) -> Compiled:
        raise NotImplementedError

    def load(self, folder: Path) -> Runnable:
        raise NotImplementedError


class Measured:
    """Stands for qcompiler.measure.sensitivity: loss = importance * 4^-bits, a little less for small groups."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[list[SitePlan]], dict[str, Any]]] = []
        self.importance = {"q": 1.0, "k": 100.0, "v": 0.01, "out": 3.0, "wide": 1.0}
        self.override: dict[str, float] = {}
        self.direction: dict[str, np.ndarray] = {}  # of the change of the output; none: orthogonal to all others
        self.truth: Callable[[np.ndarray], float] | None = None  # of a choice, if not what is predicted

    def __call__(self, model: Model, sites: list[Site], candidates: list[list[SitePlan]], **options: Any) -> Any:
        self.calls.append(([s.name for s in sites], candidates, options))
        loss = tuple(np.array([self.loss(s, p) for p in row]) for s, row in zip(sites, candidates, strict=True))
        sketches = tuple(
            np.outer(np.sqrt(row), self.direction.get(s.name, np.zeros(16))) for s, row in zip(sites, loss, strict=True)
        )
        names, specs = tuple(s.name for s in sites), tuple(tuple(p.weight for p in row) for row in candidates)
        return Sensitivity(names, specs, loss, tuple(row / 10 for row in loss), sketches, "full", {}, 16, 30, 1.0)

    def loss(self, site: Site, plan: SitePlan) -> float:
        assert plan.weight is not None
        spec = plan.weight
        size = spec.granularity.group_size(site.columns)
        if site.name in self.override:
            return self.override[site.name]
        return self.importance[site.name] * float(4.0**-spec.bits * size**0.25)


class Truth:
    """Stands for qcompiler.measure.true_loss: what was predicted, unless something else is true."""

    used = 16

    def __init__(self, measured: Measured, model: Model, menus: Sequence[Menu], used: int) -> None:
        self.measured, self.sites, self.plans = measured, [m.site for m in menus], [m.plans for m in menus]

    def losses(self, choices: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([self.loss(choice) for choice in choices])

    def loss(self, choice: np.ndarray) -> float:
        if self.measured.truth is not None:
            return self.measured.truth(choice)
        chosen = [row[o] for row, o in zip(self.plans, choice, strict=True)]
        return sum(self.measured.loss(s, p) for s, p in zip(self.sites, chosen, strict=True))

    def difference(self, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        return self.loss(first) - self.loss(second), 0.0


def shrunk(name: str, factor: float) -> Model:
    """The model, one of its weights multiplied."""
    small = model()
    value = small.graph.initializers[f"{name}.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)
    return small


def use_target(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    real = registry.find
    monkeypatch.setattr(
        registry, "find", lambda kind, name: (lambda: target) if kind == "backends" else real(kind, name)
    )


def run(allocate: Allocate | Uniform, on: Model | None = None) -> tuple[Model, Any]:
    on = on or model()
    return on, allocate.run(on, Silent())
