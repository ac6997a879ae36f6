"""A twin in parts has the same outputs and gradients, tied weights included, and keeps less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompiler.measure.segments import Segments
from qcompiler.model import Model
from tests.passes.round.small_models import build, cnn, mlp

torch = pytest.importorskip("torch")


def tied() -> Model:
    """A table that is read at the beginning and, transposed, at the end, with a residual stream between."""
    rng = np.random.default_rng(0)
    weights = {"table": rng.standard_normal((20, 12)).astype(np.float32)}
    weights |= {f"w{i}": rng.standard_normal((12, 12)).astype(np.float32) / 4 for i in range(6)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["h0"])]
    for i in range(6):
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]))
        nodes.append(helper.make_node("Add", [f"h{i}", f"t{i}"], [f"h{i + 1}"]))
    nodes.append(helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["h6", "head"], ["y"]))
    ids = rng.integers(0, 20, (4, 7))
    return build(nodes, weights, {"ids": ["n", "s"]}, ["y"], {"ids": ids})


def gradients(module: Any, x: Any) -> tuple[Any, dict[int, Any]]:
    found = module(x)[0]
    found.square().sum().backward()
    grads = {id(p): p.grad.clone() for p in module.parameters() if p.grad is not None}
    module.zero_grad()
    return found.detach(), grads


@pytest.mark.parametrize("model", [mlp(), cnn(), tied()], ids=["mlp", "cnn", "tied"])
def test_outputs_and_gradients_stay(model: Model) -> None:
    from qcompiler.measure.fx_twin import fx_twin
    from qcompiler.passes.round.recomputed import _Recomputed, recomputed

    twin = fx_twin(model.ir)
    assert model.calibration is not None
    x = torch.from_numpy(next(iter(next(iter(model.calibration.batches(4))).values())))
    expected = gradients(twin, x)
    parts = recomputed(twin, {name: s.index for s in Segments(model.ir) for name in s.made})
    found = gradients(parts, x)
    assert sum(isinstance(m, _Recomputed) for m in parts.modules()) >= len(Segments(model.ir)) - 1
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_only_one_part_is_held() -> None:
    from qcompiler.measure.fx_twin import fx_twin
    from qcompiler.passes.round.recomputed import recomputed

    def held(module: Any) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            module(x)
        return sum(sizes)

    model = tied()
    x = torch.zeros((64, 7), dtype=torch.int64)
    twin = fx_twin(model.ir)
    before = held(twin)
    assert held(recomputed(twin, {name: s.index for s in Segments(model.ir) for name in s.made})) < 0.7 * before
