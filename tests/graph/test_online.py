from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from scipy.stats import ortho_group

from qcompiler.errors import Refusal
from qcompiler.graph.online import Kronecker, insert_turn, turn_input
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from tests.graph.architectures import Net

LEFT, RIGHT = ortho_group.rvs(3, random_state=0), ortho_group.rvs(4, random_state=1)
FORMS = {
    "both": Kronecker((2, 3, 4), LEFT, RIGHT),
    "outer": Kronecker((2, 3, 4), LEFT, None),
    "inner": Kronecker((2, 3, 4), None, RIGHT),
    "one block": Kronecker((1, 6, 4), None, RIGHT),
}


def whole(turn: Kronecker) -> np.ndarray:
    blocks, a, b = turn.sizes
    left = np.eye(a) if turn.left is None else turn.left
    right = np.eye(b) if turn.right is None else turn.right
    return np.kron(np.eye(blocks), np.kron(left, right))


@pytest.mark.parametrize("shape", [(24,), (5, 24), ("batch", 5, 24), ("batch", 2, "seq", 24)])
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_multiplies_by_the_kronecker_product(form: str, shape: tuple[int | str, ...]) -> None:
    turn, net = FORMS[form], Net()
    x = net.input("x", shape)
    y = net.op("Identity", x)
    model = net.model(net.op("Identity", y))
    model.graph[1].replace_input_with(0, insert_turn(model, y, turn))
    rows = np.random.default_rng(0).normal(size=[d if isinstance(d, int) else 3 for d in shape])
    (found,) = Runner(model)({"x": rows.astype(np.float32)}).values()
    assert found.shape == rows.shape
    assert np.allclose(found, rows @ whole(turn), atol=1e-5)
    assert np.allclose(turn.after(rows), rows @ whole(turn))


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_weights_hold_the_inverse_and_equal_constants_are_stored_once(op: str) -> None:
    net = Net()
    x = net.input("x", ["batch", 24])
    first = (
        net.op("MatMul", x, net.random(24, 24)) if op == "MatMul" else net.op("Gemm", x, net.random(24, 24), transB=1)
    )
    model = net.model(net.op("MatMul", first, net.random(24, 5)))
    rows = np.random.default_rng(0).normal(size=(7, 24)).astype(np.float32)
    (wanted,) = Runner(model)({"x": rows}).values()
    sites = find_sites(model)
    for site in sites:
        assert site.activation is not None
        assert turn_input(model, site.activation, [site], FORMS["both"]) is None
    (found,) = Runner(model)({"x": rows}).values()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert sum(name.startswith("hadamard") for name in model.graph.initializers) == 2
    assert [name for _, name, _ in model.functions] == ["Hadamard"]


def test_a_value_of_unknown_rank_is_refused() -> None:
    net = Net()
    x = net.input("x", ["batch", 24])
    model = net.model(net.op("MatMul", x, net.random(24, 5)))
    (site,) = find_sites(model)
    before = site.weight.const_value
    x.shape = None
    assert isinstance(turn_input(model, x, [site], FORMS["both"]), Refusal)
    assert site.weight.const_value is before


def test_float16_stays_float16() -> None:
    net = Net()
    x = net.input("x", ["batch", 24], ir.DataType.FLOAT16)
    model = net.model(net.op("MatMul", x, net.const(net.rng.normal(size=(24, 5)).astype(np.float16))))
    rows = np.random.default_rng(0).normal(size=(7, 24)).astype(np.float16)
    (wanted,) = Runner(model)({"x": rows}).values()
    turn_input(model, x, find_sites(model), FORMS["both"])
    (found,) = Runner(model)({"x": rows}).values()
    assert found.dtype == np.float16
    assert np.abs(found.astype(np.float32) - wanted).max() < 2e-2 * np.abs(wanted).max()
