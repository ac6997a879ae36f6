"""Pairs of changes: exact where the loss is quadratic, counted, resumed after a kill, restricted."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption
from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.pairwise import PairwiseSensitivity, evaluations, pairwise_sensitivities
from qcompiler.measure.probes import Probes
from qcompiler.measure.quadratic import predicted
from qcompiler.measure.runner import Runner
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.model import Model
from qcompiler.plan import SitePlan

SPECS = [parse_spec(f"int{b}-sym-channel-fp32") for b in (2, 4, 8)]


def model_of(nodes, weights, width: int, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 12), ("y", width))]
    graph = helper.make_graph(nodes, "test", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    x = rng.standard_normal((16, 12)).astype(np.float32)
    return Model(made, calibration=Calibration.from_arrays({"x": x}, made))


def beside(branches: int = 4, width: int = 6) -> Model:
    """y = sum of x @ w_i: linear in every weight, so the squared error is quadratic in all of them."""
    op = helper.make_node
    nodes = [op("MatMul", ["x", f"w{i}"], [f"h{i}"], name=f"w{i}") for i in range(branches)]
    nodes.append(op("Sum", [f"h{i}" for i in range(branches)], ["y"]))
    return model_of(nodes, {f"w{i}": (12, width) for i in range(branches)}, width)


def deep(layers: int = 4) -> Model:
    """A chain of products with Relu between them: a segment for each, a weight used twice, peaked classes."""
    op = helper.make_node
    nodes = []
    for i in range(layers):
        weight = "w1" if i == layers - 1 else f"w{i}"
        nodes.append(op("MatMul", [f"r{i - 1}" if i else "x", weight], [f"h{i}"], name=f"m{i}"))
        nodes.append(op("Relu", [f"h{i}"], [f"r{i}"]))
    nodes.append(op("MatMul", [f"r{layers - 1}", "head"], ["y"], name="head"))
    weights = {f"w{i}": (12, 12) for i in range(layers - 1)} | {"head": (12, 15)}
    return model_of(nodes, weights, 15)


def true_loss(model: Model, sites: list[Site], chosen: list[QuantSpec | None]) -> float:
    """Normalised squared error of a whole assignment, by running all of it at once, in float64."""
    assert model.calibration is not None
    (feeds,) = model.calibration.batches(16, 16)
    total, error = np.zeros(1), np.zeros(1)
    for site, spec in zip(sites, chosen, strict=True):
        weight = site.matrix().astype(np.float64)
        total = total + feeds["x"] @ weight.T
        if spec is not None:
            error = error + feeds["x"] @ (quantize(site.matrix(), spec).decode() - weight).T
    return float((error**2).sum() / (total**2).sum())


def test_every_assignment_is_predicted_where_the_loss_is_quadratic() -> None:
    model = beside()
    sites = find_sites(model.ir)
    rows = [[*SPECS, None], [SitePlan(SPECS[1]), SPECS[0]], [None, SPECS[2], SPECS[2]], SPECS[:2]]
    found = pairwise_sensitivities(model, sites, rows, monotone=False)
    starts, gram = found.cross()
    np.testing.assert_array_equal(gram, gram.T)
    for options in product(*(range(len(row)) for row in rows)):
        chosen = [found.candidates[u][k] for u, k in enumerate(options)]
        expected = true_loss(model, sites, chosen)
        assert predicted(gram, starts[:-1] + np.array(options)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def whole_loss(model: Model, changes: dict[str, QuantSpec]) -> float:
    """KL of a changed model, without segments."""
    assert model.calibration is not None
    (feeds,) = model.calibration.batches(16, 16)
    sites = {str(s.weight.name): s for s in find_sites(model.ir)}
    weights = {n: sites[n].from_matrix(quantize(sites[n].matrix(), spec).decode()) for n, spec in changes.items()}
    z = Runner(model.ir)(feeds)["y"].astype(np.float64)
    y = Runner(model.ir, replaceable=list(weights))({**feeds, **weights})["y"].astype(np.float64)
    logp, logq = (a - np.log(np.exp(a - a.max(1, keepdims=True)).sum(1, keepdims=True)) - a.max(1, keepdims=True)
                  for a in (z, y))  # fmt: skip
    return float((np.exp(logp) * (logp - logq)).sum(1).mean())


def test_pairs_are_those_of_the_whole_model() -> None:
    """Also through the cuts of a chain, and for a weight that comes again further down."""
    model = deep()
    sites = find_sites(model.ir)
    names = [str(s.weight.name) for s in sites]
    found = pairwise_sensitivities(model, sites, [SPECS[:2]] * len(sites), monotone=False)
    assert found.kinds == {"y": "logits"}
    starts, gram = found.cross()
    for (u, first), (v, second) in product(enumerate(names), repeat=2):
        for b, c in product(range(2), repeat=2):
            if u < v:
                both = found.loss[u][b] + found.loss[v][c] + gram[starts[u] + b, starts[v] + c]
                expected = whole_loss(model, {first: SPECS[b], second: SPECS[c]})
                assert both == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_evaluations_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + L B + B^2 L (L - 1) / 2, with a cache and without; one changed boundary at a time costs no more."""
    assert evaluations([3] * 50) == 11_176
    assert evaluations([3] * 200) == 179_701
    assert evaluations([2, 0, 1]) == 1 + 3 + 2
    for cache, alive in ((None, 1 << 28), (Cache(tmp_path), 1)):
        monkeypatch.setattr("qcompiler.measure.pairwise._ALIVE_BYTES", alive)
        model = deep()
        model.cache = cache
        sites = find_sites(model.ir)
        found = pairwise_sensitivities(model, sites, [SPECS] * len(sites))
        assert found.probes == evaluations([3] * len(sites)) == 1 + 3 * 4 + 9 * 6
        assert np.isnan(found.measured).sum() == 4 * 9  # only within the four sites


def same(a: PairwiseSensitivity, b: PairwiseSensitivity) -> None:
    np.testing.assert_allclose(a.measured, b.measured, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(a.measured_noise, b.measured_noise, rtol=1e-3, atol=1e-7)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    sites = find_sites(model.ir)
    expected = pairwise_sensitivities(model, sites, [SPECS] * 4)
    model.cache = Cache(tmp_path)
    done: list[int] = []
    judge = Probes.judge

    def killed(self: Probes, *args):
        if len(done) == 30:
            raise KeyboardInterrupt
        done.append(1)
        return judge(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Probes, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            pairwise_sensitivities(model, sites, [SPECS] * 4)
    resumed = pairwise_sensitivities(model, sites, [SPECS] * 4)
    assert resumed.probes == expected.probes - 30
    same(expected, resumed)
    assert np.nanmedian(resumed.measured_noise) > 0
    turned = pairwise_sensitivities(model, sites[::-1], [SPECS] * 4)
    assert turned.probes == 1  # the order of the sites does not matter


def test_a_subset_of_pairs(tmp_path: Path) -> None:
    model = deep()
    sites = find_sites(model.ir)
    whole = pairwise_sensitivities(model, sites, [SPECS] * 4)
    near = pairwise_sensitivities(model, sites, [SPECS] * 4, pairs=1, unmeasured="zero")
    known = ~np.isnan(near.measured)
    assert 0 < known.sum() < (~np.isnan(whole.measured)).sum()
    np.testing.assert_allclose(near.measured[known], whole.measured[known], rtol=1e-4, atol=1e-7)
    cross = near.cross()[1]
    assert not (cross - np.diag(np.diag(cross)))[~known].any()
    model.cache = Cache(tmp_path)
    single = sensitivities(model, sites, [SPECS] * 4, effort="full")
    few = pairwise_sensitivities(model, sites, [SPECS] * 4, pairs=[(0, 4), (4, 0), (1, 2), (0, 11)], single=single)
    assert few.probes == 1 + 2  # (1, 2) are of one site, the singles are there already
    assert (~np.isnan(few.measured)).sum() == 4
    assert few.measured[11, 0] == pytest.approx(whole.measured[0, 11], rel=1e-4)
    gram = single.cross()[1]
    gram[[0, 4, 0, 11], [4, 0, 11, 0]] = few.measured[[0, 4, 0, 11], [4, 0, 11, 0]]
    np.testing.assert_array_equal(few.cross()[1], gram)


def test_pairs_are_told_from_probes_also_where_the_diagonal_was_extrapolated() -> None:
    model = deep()
    sites = find_sites(model.ir)
    anchored = sensitivities(model, sites, [SPECS] * 4, effort="anchor")
    found = pairwise_sensitivities(model, sites, [SPECS] * 4, single=anchored)
    whole = pairwise_sensitivities(model, sites, [SPECS] * 4)
    np.testing.assert_array_equal(found.loss, anchored.loss)
    np.testing.assert_allclose(found.measured, whole.measured, rtol=1e-4, atol=1e-7)


def test_infinite_losses_make_no_cross_term_infinite_or_nan() -> None:
    model = beside(2)
    for site in find_sites(model.ir):
        site.weight.const_value = ir.tensor(np.full(site.shape, 2e38, np.float32), name=site.weight.name)
    sites = find_sites(model.ir)
    found = pairwise_sensitivities(model, sites, [[*SPECS[:2], None]] * 2, kinds={"y": "values"}, monotone=False)
    gram = found.cross()[1]
    np.testing.assert_array_equal(np.diag(gram), [np.inf, np.inf, 0] * 2)
    assert not gram[~np.eye(6, dtype=bool)].any()
    finite = replace(found, loss=(np.array([2.0, 1, 0]),) * 2, measured=np.where(found.measured == 0, np.inf, np.nan))
    gram = finite.cross()[1]
    assert gram[0, 3] == 4  # together infinite: the bound sqrt(4 * 4)
    assert gram[0, 5] == 0


def test_what_does_not_fit_is_refused() -> None:
    model = beside(2)
    sites = find_sites(model.ir)
    with pytest.raises(BadOption, match="beyond the 6 entries"):
        pairwise_sensitivities(model, sites, [SPECS] * 2, pairs=[(0, 6)])
    single = sensitivities(model, sites, [SPECS[:2]] * 2)
    with pytest.raises(BadOption, match="other sites or candidates"):
        pairwise_sensitivities(model, sites, [SPECS] * 2, single=single)
