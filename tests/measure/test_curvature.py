"""Curvature of the loss at the weights: exact where it can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.errors import BadModel
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.model import Model

pytest.importorskip("torch")
from qcompiler.measure import curvature
from qcompiler.measure.blocks import block_scores, choose_blocks
from qcompiler.measure.curvature import Fisher, fisher, fisher_sensitivity, hessian_traces, trace_sensitivity

SPECS = [parse_spec(f"int{b}-sym-channel-fp32") for b in (3, 4, 6, 8)]


def network(nodes, weights, width: int, samples: int = 32) -> Model:
    rng = np.random.default_rng(1)
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 6), ("y", width))]
    graph = helper.make_graph(nodes, "test", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    return Model(made, calibration=Calibration.from_arrays({"x": rng.standard_normal((samples, 6), np.float32)}, made))


def linear(width: int = 5) -> Model:
    return network([helper.make_node("MatMul", ["x", "w"], ["y"], name="w")], {"w": (6, width)}, width)


def deep() -> Model:
    op = helper.make_node
    nodes = [
        op("MatMul", ["x", "a"], ["h"], name="a"),
        op("Relu", ["h"], ["r"]),
        op("MatMul", ["r", "b"], ["y"], name="b"),
    ]
    return network(nodes, {"a": (6, 16), "b": (16, 12)}, 12, samples=64)


def data(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the outputs of `linear`, float64."""
    assert model.calibration is not None
    (feeds,) = model.calibration.batches(1000)
    x = feeds["x"].astype(np.float64)
    return x, x @ find_sites(model.ir)[0].matrix().T


def test_of_least_squares_the_trace_is_exact() -> None:
    """||x dW||^2 / ||y||^2 has the Hessian 2 I (x) X^T X / ||y||^2: with orthogonal X no probe errs."""
    model = linear()
    sites = find_sites(model.ir)
    x, y = data(model)
    exact = 2 * 5 * np.square(x).sum() / np.square(y).sum()
    found = hessian_traces(model, sites, samples=32, tolerance=0.01, most=300, seed=3)
    assert found.trace[sites[0].name] == pytest.approx(exact, abs=4 * found.noise[sites[0].name])
    assert 8 <= found.probes <= 300
    assert found.noise[sites[0].name] <= 0.01 * exact * 1.1 or found.probes == 300
    orthogonal = np.linalg.qr(x[:6].T)[0].astype(np.float32)
    model.calibration = Calibration.from_arrays({"x": orthogonal}, model.ir)
    exact = 2 * 5 * 6 / np.square(orthogonal @ sites[0].matrix().T).sum()
    found = hessian_traces(model, sites, samples=6, most=20)
    assert found.trace[sites[0].name] == pytest.approx(exact, rel=1e-4)
    assert found.probes == 8


@pytest.mark.parametrize("classes", [5, 12])
def test_of_a_linear_model_the_fisher_diagonal_is_exact(classes: int) -> None:
    """Squared error of 5 numbers, KL of 12 classes: F_ij = E[x_j^2 p_i (1 - p_i)]."""
    model = linear(classes)
    (site,) = find_sites(model.ir)
    x, y = data(model)
    if classes == 5:
        exact = np.tile(2 * np.square(x).sum(0) / np.square(y).sum(), (5, 1))
    else:
        p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
        exact = (p * (1 - p)).T @ np.square(x) / len(x)
    found = fisher(model, [site], samples=32, draws=40)
    assert found.kinds == {"y": "values" if classes == 5 else "logits"}
    # (2 x_j^2 / power) (+-1)^2: no chance in it; for classes 1280 random projections
    chance = 0.0 if classes == 5 else 0.2 * exact.max()
    np.testing.assert_allclose(found.of(site), exact, rtol=1e-4, atol=chance)
    assert found.total(site) == pytest.approx(exact.sum(), rel=0.1)
    coarse = fisher(model, [site], samples=32, draws=40, block=4)
    assert coarse.means[site.name].shape == (classes, 2)
    np.testing.assert_allclose(coarse.of(site)[:, 4], found.of(site)[:, 4:].mean(1), rtol=1e-4)
    assert coarse.total(site) == pytest.approx(found.total(site), rel=1e-4)


def test_both_traces_agree_on_a_network() -> None:
    model = deep()
    sites = find_sites(model.ir)
    one = hessian_traces(model, sites, most=60)
    other = fisher(model, sites, draws=8)
    for site in sites:
        assert one.trace[site.name] == pytest.approx(other.total(site), rel=0.1)


def test_losses_come_near_those_measured_where_errors_are_small() -> None:
    model = deep()
    sites = find_sites(model.ir)
    rows = [[None, *SPECS]] * 2
    true = sensitivities(model, sites, rows, samples=64, monotone=False)
    traces = hessian_traces(model, sites)
    found = fisher_sensitivity(sites, rows, fisher(model, sites, draws=4))
    traced = trace_sensitivity(sites, rows, traces)
    for i in range(2):
        assert found.loss[i][0] == traced.loss[i][0] == 0
        ratio = found.loss[i][3:] / true.loss[i][3:]  # a diagonal cannot know how errors of one weight add up
        assert ((ratio > 0.4) & (ratio < 2.5)).all()
        assert (np.diff(traced.loss[i][1:]) < 0).all()
        assert (found.noise[i][1:] > 0).all()
    starts, gram = found.cross()
    np.testing.assert_array_equal(gram, np.diag(2 * np.concatenate(found.loss)))
    assert list(starts) == [0, 5, 10]
    dw = quantize(sites[0].matrix(), SPECS[0]).decode() - sites[0].matrix()
    expected = traces.trace[sites[0].name] / sites[0].count * np.square(dw).sum()
    assert traced.loss[0][1] == pytest.approx(expected, rel=1e-5)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    sites = find_sites(model.ir)
    expected = hessian_traces(model, sites, most=12)
    squares = fisher(model, sites)
    model.cache = Cache(tmp_path)
    done: list[int] = []
    probe = curvature._probe

    def killed(*args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return probe(*args)

    monkeypatch.setattr(curvature, "_probe", killed)
    with pytest.raises(KeyboardInterrupt):
        hessian_traces(model, sites, most=12)
    left = expected.probes - 5
    monkeypatch.setattr(curvature, "_probe", lambda *args: done.append(1) or probe(*args))
    assert hessian_traces(model, sites, most=12).trace == pytest.approx(expected.trace)
    assert len(done) == 5 + left
    fisher(model, sites)
    monkeypatch.setattr(curvature, "_squares", None)
    assert fisher(model, sites).noise == pytest.approx(squares.noise)


def test_what_has_no_gradient_says_so() -> None:
    op = helper.make_node
    nodes = [op("MatMul", ["x", "w"], ["h"], name="w"), op("Hardmax", ["h"], ["y"], name="hard")]
    model = network(nodes, {"w": (6, 5)}, 5)
    with pytest.raises(BadModel, match="hard: operator Hardmax has no differentiable form"):
        fisher(model, find_sites(model.ir))


def test_blocks_are_scored_and_one_threshold_chooses_among_all_sites() -> None:
    model = deep()
    sites = find_sites(model.ir)
    found = fisher(model, sites)
    low, high = SPECS[0], SPECS[2]
    scores = {site.name: block_scores(site, found, low, high, block=4) for site in sites}
    site = sites[0]  # 16 rows of 6 columns: blocks of 4 and 2
    change = quantize(site.matrix(), low).decode() - quantize(site.matrix(), high).decode()
    expected = (found.of(site)[3, 4:] * change[3, 4:] ** 2).sum()
    assert scores[site.name].shape == (16, 2)
    assert scores[site.name][3, 1] == pytest.approx(expected)
    sizes = {name: s.size for name, s in scores.items()}
    last = 0.0
    for fraction in (0.0, 0.3, 0.7, 0.9, 1.0):
        chosen = choose_blocks(scores, fraction, masks=True)
        assert chosen.masks is not None
        better = sum(mask.sum() for mask in chosen.masks.values())
        assert better == sum(sizes.values()) - round(fraction * sum(sizes.values()))
        assert chosen.threshold >= last
        last = chosen.threshold
        for name, mask in chosen.masks.items():
            np.testing.assert_array_equal(mask, scores[name] >= chosen.threshold)
            assert chosen.fraction[name] == pytest.approx(mask.mean())
    flat = Fisher({s.name: np.ones((s.rows, s.columns), np.float32) for s in sites}, {}, 1, {}, 1, 0.0)
    error = quantize(sites[1].matrix(), low).decode() - quantize(sites[1].matrix(), high).decode()
    np.testing.assert_allclose(
        block_scores(sites[1], flat, low, high), np.square(error).reshape(12, 1, 16).sum(2), rtol=1e-5
    )


def test_equal_scores_and_bad_ones() -> None:
    chosen = choose_blocks({"a": np.zeros((2, 3)), "b": np.zeros((1, 4))}, 0.5)
    assert (chosen.masks, chosen.threshold) == (None, 0)
    assert chosen.fraction == {"a": pytest.approx(1 / 6), "b": 1}  # the first five keep the worse format
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_blocks({"a": np.zeros((2, 3))}, 1.1)
    with pytest.raises(ValueError, match="NaN"):
        choose_blocks({"a": np.full((2, 3), np.nan)}, 0.5)
