from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.errors import BadData
from qcompiler.graph.sites import find_sites
from qcompiler.measure import stream
from qcompiler.measure.cache import Cache
from qcompiler.measure.gram import gram_bytes, grams
from qcompiler.measure.patches import site_inputs
from qcompiler.measure.runner import Runner
from qcompiler.measure.statistics import channel_statistics, histograms
from qcompiler.model import Model

RNG = np.random.default_rng(2)
FLOAT = TensorProto.FLOAT


def graph(nodes, shapes: dict[str, list], tensors: dict[str, np.ndarray], out: str = "y") -> ir.Model:
    inputs = [helper.make_tensor_value_info(n, FLOAT, s) for n, s in shapes.items()]
    initializers = [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    made = helper.make_graph(nodes, "test", inputs, [helper.make_tensor_value_info(out, FLOAT, None)], initializers)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ShapeInferencePass()(ir.from_proto(proto)).model


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "plain": ("Conv", (6, 4, 3, 3), {}),
    "strided, padded": ("Conv", (6, 4, 3, 2), {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    "dilated": ("Conv", (6, 4, 3, 3), {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    "grouped": ("Conv", (6, 2, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (4, 1, 3, 3), {"group": 4, "pads": [1] * 4}),
    "same upper": ("Conv", (6, 4, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ("Conv", (6, 4, 3, 4), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "valid": ("Conv", (6, 4, 3, 4), {"auto_pad": "VALID"}),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), {}),
    "transposed, strided": (
        "ConvTranspose", (4, 6, 3, 2), {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]},
    ),
    "transposed, grouped": ("ConvTranspose", (4, 3, 2, 2), {"group": 2, "strides": [2, 2]}),
    "transposed, dilated": ("ConvTranspose", (4, 6, 3, 3), {"dilations": [2, 1], "strides": [2, 2]}),
    "transposed to a shape": ("ConvTranspose", (4, 6, 3, 3), {"strides": [2, 2], "output_shape": [14, 18]}),
    "transposed, same": ("ConvTranspose", (4, 6, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_patches_times_the_matrix_is_the_convolution(case: str) -> None:
    op, shape, attributes = CONVOLUTIONS[case]
    weight, x = floats(*shape), floats(2, 4, 7, 9)
    model = graph([helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"x": ["n", 4, 7, 9]}, {"w": weight})
    (site,) = find_sites(model)
    expected = Runner(model)({"x": x})["y"]  # [batch, rows, *positions]
    rows = site_inputs(site, x)
    assert rows.shape[0] == site.groups
    assert rows.shape[2] == site.columns
    split = site.matrix().reshape(site.groups, -1, site.columns)
    product = np.einsum("gtk,grk->tgr", rows, split).reshape(-1, site.rows)
    np.testing.assert_allclose(product, np.moveaxis(expected, 1, -1).reshape(-1, site.rows), rtol=1e-4, atol=1e-4)
    few = site_inputs(site, x, rows=5)
    assert few.shape == (site.groups, 5, site.columns)
    np.testing.assert_array_equal(few[:, [0, -1]], rows[:, [0, -1]])


def test_patches_of_a_one_dimensional_convolution() -> None:
    weight, x = floats(5, 3, 4), floats(2, 3, 11)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2], pads=[3, 1])
    model = graph([node], {"x": ["n", 3, 11]}, {"w": weight})
    (site,) = find_sites(model)
    product = site_inputs(site, x)[0] @ site.matrix().T
    expected = np.moveaxis(Runner(model)({"x": x})["y"], 1, -1).reshape(-1, 5)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_products() -> None:
    weight, x = floats(3, 8, 5), floats(2, 3, 4, 8)
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3, "t", 8]}, {"w": weight})
    (site,) = find_sites(model)
    rows = site_inputs(site, x)
    assert rows.shape == (3, 8, 8)
    product = np.einsum("gtk,grk->gtr", rows, site.matrix().reshape(3, 5, 8))
    expected = Runner(model)({"x": x})["y"].transpose(1, 0, 2, 3).reshape(3, 8, 5)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


def chain(widths: tuple[int, ...] = (6, 8, 4), samples: int = 50) -> Model:
    """MatMul, Relu, MatMul on rows of x; `twin` reads the same rows as `w0`."""
    tensors = {f"w{i}": floats(a, b) for i, (a, b) in enumerate(pairwise(widths))}
    tensors["twin"] = floats(widths[0], widths[1])
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("MatMul", ["x", "twin"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["h"]),
        helper.make_node("MatMul", ["h", "w1"], ["y"]),
    ]
    made = graph(nodes, {"x": ["n", 3, widths[0]]}, tensors)
    x = floats(samples, 3, widths[0]) * np.linspace(0.1, 3, samples, dtype=np.float32)[:, None, None]
    return Model(made, calibration=Calibration.from_arrays({"x": x}, made))


def everything(model: Model) -> dict[str, np.ndarray]:
    assert model.calibration is not None
    parts = [Runner(model.ir, outputs=["x", "h", "y"])(f) for f in model.calibration.batches(7)]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


@pytest.mark.parametrize("alive", [1, 192 << 20])
def test_channel_statistics_equal_numpy(monkeypatch: pytest.MonkeyPatch, alive: int) -> None:
    monkeypatch.setattr(stream, "_ALIVE_BYTES", alive)
    model = chain()
    full = everything(model)
    found = channel_statistics(model, ["h", "x", "y"], axis={"x": 1})
    for name, axis in (("h", 2), ("x", 1), ("y", 2)):
        wide = np.moveaxis(full[name], axis, -1).reshape(-1, full[name].shape[axis])
        np.testing.assert_allclose(found[name].low, wide.min(0), rtol=1e-5)
        np.testing.assert_allclose(found[name].high, wide.max(0), rtol=1e-5)
        np.testing.assert_allclose(found[name].absmax, np.abs(wide).max(0), rtol=1e-5)
        np.testing.assert_allclose(found[name].mean, wide.mean(0), rtol=1e-4, atol=1e-5)
        assert found[name].count == wide.shape[0]
    assert channel_statistics(model, ["x"], limit=4)["x"].count == 12


def test_histograms_widen_as_data_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LARGEST_BATCH", 3)  # the samples grow, so the range must double on the way
    model = chain(samples=60)
    y = everything(model)["y"].ravel()
    found = histograms(model, ["y"], bins=2048)["y"]
    assert found.counts.sum() == y.size
    assert (found.low, found.high) == pytest.approx((y.min(), y.max()), rel=1e-5)
    width = 2 * found.reach / 2048
    for percent in (0, 0.5, 25, 50, 99, 100):
        exact = np.percentile(y, percent, method="inverted_cdf")
        assert found.percentile(percent) == pytest.approx(exact, abs=1.5 * width)
    expected, _ = np.histogram(y, 2048, (-found.reach, found.reach))
    assert np.abs(np.cumsum(found.counts) - np.cumsum(expected)).max() <= 3


def test_grams_equal_numpy_and_are_shared() -> None:
    model = chain()
    sites = find_sites(model.ir)
    found = grams(model, sites)
    by_weight = {s.weight.name: found[s.name] for s in sites}
    full = everything(model)
    for weight, value in (("w0", "x"), ("w1", "h")):
        rows = full[value].reshape(-1, full[value].shape[-1]).astype(np.float64)
        gram = by_weight[weight]
        np.testing.assert_allclose(gram.matrix[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gram.mean[0], rows.mean(0), rtol=1e-5, atol=1e-5)
        assert gram.count == len(rows)
    assert by_weight["w0"] is by_weight["twin"]
    assert gram_bytes(sites) == 4 * (6 * 6 + 8 * 8)


def test_the_gram_gives_the_output_error_of_a_change() -> None:
    op, shape, attributes = CONVOLUTIONS["grouped"]
    made = graph([helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"x": ["n", 4, 7, 9]}, {"w": floats(*shape)})
    x = floats(6, 4, 7, 9)
    model = Model(made, calibration=Calibration.from_arrays({"x": x}, made))
    (site,) = find_sites(made)
    change = floats(site.rows, site.columns)
    runner = Runner(made, replaceable=["w"])
    new = site.from_matrix(site.matrix() + change)
    difference = runner({"x": x, "w": new})["y"] - runner({"x": x})["y"]
    expected = (difference**2).sum(1).mean()
    assert grams(model, [site])[site.name].error(change) == pytest.approx(expected, rel=1e-4)


def test_a_tied_weight_averages_over_all_that_multiply_it() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    made = graph(nodes, {"x": ["n", 6]}, {"w": floats(6, 6)})
    x = floats(20, 6)
    model = Model(made, calibration=Calibration.from_arrays({"x": x}, made))
    (site,) = find_sites(made)
    rows = np.concatenate([x, Runner(made, outputs=["r"])({"x": x})["r"]]).astype(np.float64)
    gram = grams(model, [site])[site.name]
    np.testing.assert_allclose(gram.matrix[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_results_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    model.cache = Cache(tmp_path)
    sites = find_sites(model.ir)
    first = (channel_statistics(model, ["h"]), histograms(model, ["y"]), grams(model, sites))

    def forbidden(*_: object) -> None:
        raise AssertionError("measured again")

    for module in ("statistics", "gram"):
        monkeypatch.setattr(f"qcompiler.measure.{module}.activations", forbidden)
    again = (channel_statistics(model, ["h"]), histograms(model, ["y"]), grams(model, sites))
    np.testing.assert_array_equal(first[0]["h"].mean, again[0]["h"].mean)
    assert first[1]["y"].reach == again[1]["y"].reach
    assert first[2].keys() == again[2].keys()
    for name in first[2]:
        np.testing.assert_array_equal(first[2][name].matrix, again[2][name].matrix)
    with pytest.raises(AssertionError, match="measured again"):
        channel_statistics(model, ["h"], limit=3)


def test_without_data_it_says_so() -> None:
    model = chain()
    model.calibration = None
    with pytest.raises(BadData, match="no calibration data"):
        channel_statistics(model, ["x"])
