"""Losses from Gram matrices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.formats import parse_spec
from qcompiler.formats.granularity import PerGroup, PerTensor
from qcompiler.graph.sites import find_sites
from qcompiler.measure.gram import grams
from qcompiler.measure.proxy import column_costs, inverse_squares, proxy_sensitivity, saliences, site_curvature
from qcompiler.model import Model

RNG = np.random.default_rng(5)


def random_gram(groups: int, columns: int) -> np.ndarray:
    x = RNG.standard_normal((groups, 60, columns)) * RNG.uniform(0.1, 3, columns)
    x[..., 1] += x[..., 0]
    return (np.swapaxes(x, 1, 2) @ x / 60).astype(np.float32)


def model_of() -> Model:
    """A look-up, a product of what it finds, and a convolution with two groups."""
    op, floats = helper.make_node, TensorProto.FLOAT
    nodes = [
        op("Gather", ["table", "ids"], ["e"], name="table"),
        op("MatMul", ["e", "w"], ["h"], name="product"),
        op("Conv", ["image", "k"], ["c"], name="conv", group=2),
    ]
    shapes = {"table": (30, 8), "w": (8, 6), "k": (4, 3, 2, 2)}
    tensors = [numpy_helper.from_array(RNG.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 5]),
        helper.make_tensor_value_info("image", floats, ["n", 6, 4, 4]),
    ]
    outputs = [
        helper.make_tensor_value_info("h", floats, ["n", 5, 6]),
        helper.make_tensor_value_info("c", floats, ["n", 4, 3, 3]),
    ]
    graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    arrays = {"ids": RNG.integers(0, 30, (12, 5)), "image": RNG.standard_normal((12, 6, 4, 4)).astype(np.float32)}
    return Model(made, calibration=Calibration.from_arrays(arrays, made))


@pytest.mark.parametrize("groups", [1, 3])
def test_the_factor_is_that_of_the_inverse(groups: int) -> None:
    gram = random_gram(groups, 9)
    found = inverse_squares(gram, damping=0.01)
    for matrix, values in zip(gram.astype(np.float64), found, strict=True):
        h = 2 * matrix
        h += np.eye(9) * 0.01 * np.trace(h) / 9
        upper = np.linalg.cholesky(np.linalg.inv(h)).T
        np.testing.assert_allclose(values, 1 / np.diag(upper) ** 2, rtol=1e-6)


def test_what_cannot_be_factored() -> None:
    singular = np.ones((1, 6, 6), np.float32)
    assert np.isfinite(inverse_squares(singular)).all()
    np.testing.assert_allclose(inverse_squares(np.zeros((1, 3, 3))), 0.01)
    indefinite = -np.eye(3)[None] + 2  # repaired by more damping
    assert (inverse_squares(indefinite) > 0).all()
    with pytest.raises(ValueError, match="indefinite"):
        inverse_squares(-np.eye(3)[None])
    with pytest.raises(ValueError, match="NaN"):
        inverse_squares(np.full((1, 2, 2), np.nan))


def test_costs_of_columns_by_hand() -> None:
    matrix, curvature = RNG.standard_normal((6, 9)).astype(np.float32), inverse_squares(random_gram(2, 9))
    ranges = np.ptp(matrix.astype(np.float64), axis=1)
    expected = [
        sum(ranges[i] ** 2 / 24 * curvature[0 if i < 3 else 1, j] for i in range(6)) for j in range(9)
    ]  # the first three rows are the first group's
    np.testing.assert_allclose(column_costs(matrix, curvature), expected, rtol=1e-6)
    whole = column_costs(matrix, curvature, PerTensor())
    np.testing.assert_allclose(whole, np.ptp(matrix) ** 2 / 24 * 3 * curvature.sum(0), rtol=1e-6)
    fine = column_costs(matrix, curvature, PerGroup(4))
    assert (fine <= column_costs(matrix, curvature) + 1e-12).all()
    parts = [column_costs(matrix[:, s], curvature[:, s]) for s in (slice(0, 4), slice(4, 8), slice(8, 9))]
    np.testing.assert_allclose(fine, np.concatenate(parts), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(column_costs(2 * matrix, curvature), 4 * np.array(expected), rtol=1e-6)


def test_salience_follows_the_columns_when_they_are_permuted() -> None:
    matrix, curvature = RNG.standard_normal((6, 10)).astype(np.float32), inverse_squares(random_gram(1, 10))
    found = saliences(matrix, curvature, 4)
    each = (matrix.astype(np.float64) ** 2).sum(0) * curvature[0]
    np.testing.assert_allclose(found, [each[:4].sum(), each[4:8].sum(), each[8:].sum()])
    order = np.r_[4:8, 0:4, 8:10]
    np.testing.assert_allclose(saliences(matrix[:, order], curvature[:, order], 4), found[[1, 0, 2]])


def test_losses_of_a_model() -> None:
    model = model_of()
    sites = find_sites(model.ir)
    specs = [None, *(parse_spec(f"int{b}-sym-channel-fp32") for b in (3, 4, 8)), parse_spec("int4-sym-g3-fp32")]
    found = proxy_sensitivity(model, sites, [specs] * 3)
    by_name = grams(model, sites)
    assert (found.mode, found.samples, found.cross()[0][-1]) == ("proxy", 12, 15)
    for site, loss in zip(sites, found.loss, strict=True):
        assert loss[0] == 0
        np.testing.assert_allclose(loss[1:4], loss[1] * np.array([1, 1 / 4, 2.0**-10]), rtol=1e-9)
        assert 0 < loss[4] < loss[2]  # ranges of three columns are smaller
        total = column_costs(site.matrix(), site_curvature(site, by_name)).sum()
        assert loss[2] == pytest.approx(total * 2.0**-8)
    table = next(s for s in sites if s.op == "Gather")
    ranges = np.ptp(table.matrix(), axis=1)
    expected = (ranges**2).mean() * 8 / 12 * 2.0**-8  # E||dw||^2 of a row, every weight r^2 / 12 * 2^-8
    assert found.loss[sites.index(table)][2] == pytest.approx(expected, rel=1e-5)
