from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.loss import Reference, output_kind, output_loss
from qcompiler.measure.probes import Probes
from qcompiler.measure.runner import Runner
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.model import Model
from qcompiler.plan import SitePlan

RNG = np.random.default_rng(3)
SPECS = [parse_spec(f"int{b}-sym-channel-fp32") for b in (2, 3, 4, 6, 8)]


def network(classes: int, relu: bool, samples: int = 64) -> Model:
    """x @ a (relu) @ b, and x @ c beside it: y = both added."""
    op = helper.make_node
    widths = {"a": (12, 20), "b": (20, classes), "c": (12, classes)}
    tensors = [numpy_helper.from_array(RNG.standard_normal(s).astype(np.float32), n) for n, s in widths.items()]
    nodes = [
        op("MatMul", ["x", "a"], ["h"], name="a"),
        op("Relu" if relu else "Identity", ["h"], ["r"]),
        op("MatMul", ["r", "b"], ["p"], name="b"),
        op("MatMul", ["x", "c"], ["q"], name="c"),
        op("Add", ["p", "q"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 12), ("y", classes))]
    graph = helper.make_graph(nodes, "test", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    x = RNG.standard_normal((samples, 12)).astype(np.float32)
    return Model(made, calibration=Calibration.from_arrays({"x": x}, made))


def feeds_of(model: Model, count: int) -> dict[str, np.ndarray]:
    assert model.calibration is not None
    return next(iter(model.calibration.spread(count).batches(count)))


def kl(reference: np.ndarray, outputs: np.ndarray) -> float:
    def log_softmax(z: np.ndarray) -> np.ndarray:
        wide = z.astype(np.float64) - z.max(-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(outputs)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def changed(model: Model, name: str, spec: QuantSpec, count: int) -> np.ndarray:
    site = next(s for s in find_sites(model.ir) if s.weight.name == name)
    weight = site.from_matrix(quantize(site.matrix(), spec).decode())
    return Runner(model.ir, replaceable=[name])({**feeds_of(model, count), name: weight})["y"]


def by_weight(model: Model) -> list[str]:
    return [str(site.weight.name) for site in find_sites(model.ir)]


@pytest.mark.parametrize("classes", [15, 5])
def test_losses_are_those_of_the_whole_model(classes: int) -> None:
    """KL for 15 peaked classes, normalised squared error for 5 numbers."""
    model = network(classes, relu=True)
    sites = find_sites(model.ir)
    found = sensitivities(model, sites, [SPECS] * len(sites), samples=16, effort="full", monotone=False)
    assert found.mode == "full"
    assert found.kinds == {"y": "logits" if classes == 15 else "values"}
    reference = Runner(model.ir)(feeds_of(model, 16))["y"]
    for name, losses in zip(by_weight(model), found.loss, strict=True):
        for spec, loss in zip(SPECS, losses, strict=True):
            y = changed(model, name, spec, 16)
            expected = kl(reference, y) if classes == 15 else ((y - reference) ** 2).sum() / (reference**2).sum()
            assert loss == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_cross_terms_are_exact_for_a_linear_model_and_squared_error() -> None:
    """The output is linear in c and in b, so pairs of these two add exactly as the quadratic form says."""
    model = network(5, relu=False)
    sites = find_sites(model.ir)
    found = sensitivities(model, sites, [SPECS[:3]] * len(sites), samples=16, monotone=False)
    starts, gram = found.cross()
    np.testing.assert_allclose(gram, gram.T)
    order = by_weight(model)
    reference = Runner(model.ir)(feeds_of(model, 16))["y"].astype(np.float64)
    for i, first in enumerate(SPECS[:3]):
        for j, second in enumerate(SPECS[:3]):
            dz = [changed(model, "b", first, 16) - reference, changed(model, "c", second, 16) - reference]
            true = ((dz[0] + dz[1]) ** 2).sum() / (reference**2).sum()
            at = [starts[order.index("b")] + i, starts[order.index("c")] + j]
            assert gram[np.ix_(at, at)].sum() / 2 == pytest.approx(true, rel=1e-3)
    within = gram[starts[0] : starts[1], starts[0] : starts[1]]
    np.testing.assert_array_equal(within, np.diag(np.diag(within)))


def test_anchored_losses_are_exact_where_the_output_is_the_site() -> None:
    model = network(5, relu=False)
    sites = [s for s in find_sites(model.ir) if s.weight.name in ("b", "c")]
    full = sensitivities(model, sites, [SPECS] * 2, samples=16, effort="full")
    anchored = sensitivities(model, sites, [SPECS] * 2, samples=16, effort="anchor")
    assert (anchored.mode, anchored.probes, full.probes) == ("anchor", 2, 10)
    for a, b in zip(full.loss, anchored.loss, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    at = (2, 5 + 2)  # the anchors, int4: only their sketches are measured
    assert anchored.cross()[1][at] == pytest.approx(full.cross()[1][at], rel=1e-3)


def test_wide_formats_are_told_from_narrow_ones() -> None:
    """Exactly where the output is the site, nearly behind a Relu."""
    model = network(5, relu=True)
    sites = find_sites(model.ir)
    full = sensitivities(model, sites, [SPECS] * 3, samples=32, effort="full", monotone=False)
    tail = sensitivities(model, sites, [SPECS] * 3, samples=32, effort="tail", monotone=False)
    assert (tail.mode, tail.probes, full.probes) == ("tail", 9, 15)
    for name, a, b in zip(by_weight(model), full.loss, tail.loss, strict=True):
        np.testing.assert_array_equal(a[:3], b[:3])
        np.testing.assert_allclose(a[3:], b[3:], rtol=0.4 if name == "a" else 1e-3)


def test_too_little_time_makes_anchors() -> None:
    model = network(15, relu=True)
    sites = find_sites(model.ir)
    assert sensitivities(model, sites, [SPECS] * 3, seconds=0.0).mode == "anchor"
    assert sensitivities(model, sites, [SPECS] * 3, seconds=1e6).mode == "tail"


def test_float_and_repeated_candidates_cost_nothing() -> None:
    model = network(15, relu=True)
    sites = find_sites(model.ir)
    row = [None, SPECS[1], SitePlan(SPECS[1], "dynamic"), SitePlan(None)]
    found = sensitivities(model, sites, {s.name: row for s in sites}, samples=8)
    assert found.probes == len(sites)
    for losses in found.loss:
        assert losses[0] == losses[3] == 0
        assert losses[1] == losses[2] > 0


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(15, relu=True)
    sites = find_sites(model.ir)
    expected = sensitivities(model, sites, [SPECS] * 3, samples=16, effort="full")
    model.cache = Cache(tmp_path)
    done: list[str] = []
    probe = Probes.probe

    def killed(self: Probes, site, spec):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(site.name)
        return probe(self, site, spec)

    with monkeypatch.context() as patch:
        patch.setattr(Probes, "probe", killed)
        with pytest.raises(KeyboardInterrupt):
            sensitivities(model, sites, [SPECS] * 3, samples=16, effort="full")
    resumed = sensitivities(model, sites, [SPECS] * 3, samples=16, effort="full")
    assert resumed.probes == 15 - 7
    again = sensitivities(model, sites, [SPECS] * 3, samples=16, effort="full")
    assert again.probes == 0
    for found in (resumed, again):
        for a, b in zip(expected.loss, found.loss, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    weight = sites[0].weight.const_value
    assert weight is not None
    sites[0].weight.const_value = ir.tensor(weight.numpy() * np.float32(1.1), name=weight.name)
    assert sensitivities(model, find_sites(model.ir), [SPECS] * 3, samples=16, effort="full").probes == 15


def test_losses_never_rise_with_bits() -> None:
    model = network(15, relu=True, samples=4)
    sites = find_sites(model.ir)
    specs = [parse_spec(f"int{b}-sym-{g}-fp32") for g in ("channel", "g4") for b in (8, 7, 6, 5, 4, 3, 2)]
    raw = sensitivities(model, sites, [specs] * 3, samples=2, monotone=False)
    found = sensitivities(model, sites, [specs] * 3, samples=2)
    for before, after in zip(raw.loss, found.loss, strict=True):
        for family in (slice(0, 7), slice(7, 14)):
            assert (np.diff(after[family]) >= 0).all()
            assert after[family].sum() == pytest.approx(before[family].sum())


def test_sketches_are_unbiased_for_kl() -> None:
    z = RNG.standard_normal((8, 200)).astype(np.float32) * 4
    changes = [RNG.standard_normal(z.shape).astype(np.float32) * 0.05 for _ in range(2)]
    exact = Reference({"y": z}, width=8 * 200)
    a, b = (exact.measure({"y": z + d})[1] for d in changes)
    assert a @ a / 2 == pytest.approx(exact.losses({"y": z + changes[0]}).mean(), rel=0.1)
    small = [Reference({"y": z}, width=160, seed=s) for s in range(300)]
    products = [np.dot(*(r.measure({"y": z + d})[1] for d in changes)) for r in small]
    assert all(r.width == 160 for r in small)
    spread = np.std(products) / np.sqrt(len(products))
    assert np.mean(products) == pytest.approx(a @ b, abs=4 * spread)


def test_divergence_is_precise_for_tiny_and_for_huge_changes() -> None:
    z = RNG.standard_normal((9, 50)).astype(np.float32) * 5
    noise = RNG.standard_normal(z.shape).astype(np.float32)
    for size in (1e-2, 1.0, 100.0):
        y = (z + size * noise).astype(np.float32)
        assert output_loss({"y": z}, {"y": y}, {"y": "logits"}) == pytest.approx(kl(z, y), rel=2e-4)
    assert output_loss({"y": z}, {"y": z + 3}, {"y": "logits"}) == pytest.approx(0, abs=1e-9)
    sure = z.copy()
    sure[:, 0] += 500  # the others' probabilities are 0 in float32
    assert output_loss({"y": sure}, {"y": sure[:, ::-1]}, {"y": "logits"}) == pytest.approx(
        kl(sure, sure[:, ::-1]), rel=1e-6
    )


def test_kinds_of_outputs() -> None:
    logits = RNG.standard_normal((32, 100)).astype(np.float32) * 4
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    unit = logits / np.linalg.norm(logits, axis=-1, keepdims=True)
    assert output_kind(logits) == "logits"
    assert output_kind(logits.reshape(2, 16, 100)) == "logits"
    assert output_kind(p) == "probabilities"
    assert output_kind(p[:, :1]) == "values"
    assert output_kind(unit) == "values"
    assert output_kind((logits / 4).astype(np.float32)) == "values"
    assert output_kind(logits[:, :9]) == "values"
    assert output_kind(logits.reshape(2, 4, 4, 100)) == "values"
    assert output_kind(np.arange(20).reshape(2, 10)) == "values"
    assert output_loss({"y": p}, {"y": np.roll(p, 1, 0)}) == pytest.approx(kl(logits, np.roll(logits, 1, 0)), rel=1e-3)


def test_noise_says_how_far_parts_of_the_data_differ() -> None:
    model = network(15, relu=True, samples=64)
    found = sensitivities(model, find_sites(model.ir), [SPECS[:2]] * 3, samples=64)
    for loss, noise in zip(found.loss, found.noise, strict=True):
        assert (noise > 0).all()
        assert (noise < loss).all()
