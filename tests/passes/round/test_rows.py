"""The rows of a site reproduce the operation's own output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.passes.round.rows import block_count, input_rows
from tests.passes.round.small_models import build

RNG = np.random.default_rng(2)


@pytest.mark.parametrize(
    ("op", "shape", "x", "attributes"),
    [
        ("Conv", (6, 4, 3, 3), (2, 4, 9, 8), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        ("Conv", (6, 2, 3, 2), (2, 4, 9, 8), {"group": 2, "dilations": [2, 3]}),
        ("Conv", (4, 1, 5), (3, 4, 11), {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2]}),
        ("Conv", (4, 4, 4), (3, 4, 11), {"auto_pad": "SAME_LOWER", "strides": [3]}),
        ("ConvTranspose", (4, 3, 3, 2), (2, 4, 5, 6), {"strides": [2, 3], "dilations": [1, 2]}),
        ("ConvTranspose", (4, 3, 3), (2, 4, 5), {"strides": [2], "group": 2}),
    ],
)
def test_convolutions(op: str, shape: tuple[int, ...], x: tuple[int, ...], attributes: dict[str, Any]) -> None:
    data = RNG.standard_normal(x).astype(np.float32)
    weight = RNG.standard_normal(shape).astype(np.float32)
    node = helper.make_node(op, ["x", "w"], ["y"], name="conv", **attributes)
    check(build([node], {"w": weight}, {"x": list(x)}, ["y"], {"x": data}), data, channels=1)


def test_products() -> None:
    data = RNG.standard_normal((2, 5, 7)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    check(
        build([node], {"w": RNG.standard_normal((7, 3)).astype(np.float32)}, {"x": [2, 5, 7]}, ["y"], {"x": data}),
        data,
        -1,
    )


def test_batch_of_matrices() -> None:
    data = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32)
    weight = RNG.standard_normal((3, 7, 4)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    model = build([node], {"w": weight}, {"x": [2, 3, 5, 7]}, ["y"], {"x": data})
    (site,) = find_sites(model.ir)
    rows = input_rows(site, data, 1000, RNG)
    assert block_count(site) == 3
    made = np.einsum("rbk,bnk->rbn", rows, site.matrix().reshape(3, 4, 7))
    np.testing.assert_allclose(made.reshape(2, 5, 3, 4).swapaxes(1, 2), data @ weight, rtol=1e-4, atol=1e-5)


def check(model: Any, data: np.ndarray, channels: int) -> None:
    (site,) = find_sites(model.ir)
    expected = np.moveaxis(Runner(model.ir)({"x": data})["y"], channels, -1).reshape(-1, site.rows)
    blocks = block_count(site)
    rows = input_rows(site, data, 1 << 20, RNG)
    made = np.einsum("rbk,bnk->rbn", rows, site.matrix().reshape(blocks, -1, site.columns)).reshape(-1, site.rows)
    if site.op == "ConvTranspose":  # the full output, which output padding and pads only crop or extend
        assert len(made) >= len(expected)
    np.testing.assert_allclose(made[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    few = input_rows(site, data, 4, RNG)
    assert len(few) <= 4
    assert all((np.abs(rows - row).max((1, 2)) == 0).any() for row in few)
