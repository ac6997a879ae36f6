"""Disturbing one operator at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.errors import BadData
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache, fingerprint
from qcompiler.measure.masked import _Masks, masked_sensitivity
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.model import Model

SPECS = [None, *(parse_spec(f"int{b}-sym-channel-fp32") for b in (2, 4, 8))]


def model_of() -> Model:
    """y = x @ a @ b + x @ tiny, where a is used twice and y is the output of an operation with a weight."""
    rng = np.random.default_rng(4)
    op = helper.make_node
    nodes = [
        op("MatMul", ["x", "a"], ["h"], name="first"),
        op("Relu", ["h"], ["r"]),
        op("MatMul", ["r", "a"], ["s"], name="second"),
        op("MatMul", ["x", "tiny"], ["t"], name="tiny"),
        op("Add", ["s", "t"], ["sum"]),
        op("MatMul", ["sum", "b"], ["y"], name="last"),
    ]
    values = {"a": rng.standard_normal((32, 32)), "tiny": 0.01 * rng.standard_normal((32, 32))}
    values["b"] = rng.standard_normal((32, 16))
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 32), ("y", 16))]
    graph = helper.make_graph(nodes, "test", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    x = rng.standard_normal((40, 32)).astype(np.float32)
    return Model(made, calibration=Calibration.from_arrays({"x": x}, made))


def test_quantized_weights_on_a_few_samples() -> None:
    model = model_of()
    sites = find_sites(model.ir)
    found = masked_sensitivity(model, sites, [SPECS] * 3)
    true = sensitivities(model, sites, [SPECS] * 3, samples=8)
    most = np.concatenate(true.loss).max()
    assert (found.samples, found.mode, found.cross()[0][-1]) == (8, "masked", 12)
    for a, b, noise in zip(found.loss, true.loss, found.noise, strict=True):
        np.testing.assert_allclose(a, b / most, rtol=1e-5)
        assert (noise < 1).all()
    assert np.concatenate(found.loss).max() == 1
    gram = found.cross()[1]
    np.testing.assert_array_equal(gram, np.diag(np.diag(gram)))


@pytest.mark.parametrize("synthetic", [False, True])
def test_masked_outputs(synthetic: bool) -> None:
    model = model_of()
    model.calibration = None if synthetic else model.calibration
    sites = find_sites(model.ir)
    before = fingerprint(model.ir)
    found = masked_sensitivity(model, sites, [SPECS] * 3, disturb="output", synthetic=synthetic)
    assert fingerprint(model.ir) == before
    by_name = dict(zip([str(s.weight.name) for s in sites], zip(sites, found.loss, strict=True), strict=True))
    assert np.concatenate(found.loss).max() == 1
    assert by_name["tiny"][1].max() < 0.01 * by_name["a"][1].max()
    for site, loss in by_name.values():
        errors = [((quantize(site.matrix(), s).decode() - site.matrix()) ** 2).sum() for s in SPECS if s is not None]
        np.testing.assert_allclose(loss[1:] / loss[1], np.array(errors) / errors[0], rtol=1e-4)
        assert loss[0] == 0


def test_of_the_last_operator_the_loss_is_what_is_taken_away() -> None:
    """Squared error relative to the output's size: the share of the energy, that of the blocks on average."""
    model = model_of()
    sites = find_sites(model.ir)
    masks = _Masks(model, sites, 40, {"y": "values"})
    last = next(i for i, site in enumerate(sites) if site.weight.name == "b")
    losses = masks.losses(last, 0.25, 60, seed=1)
    assert losses.mean() == pytest.approx(0.25, abs=4 * losses.std() / np.sqrt(60))
    assert masks.losses(last, 1.0, 1, seed=1) == pytest.approx(1.0)
    first = next(i for i, site in enumerate(sites) if site.weight.name == "a")
    (whole,) = masks.losses(first, 1.0, 1, seed=1)  # both its uses vanish: what is left is x @ tiny @ b
    assert model.calibration is not None
    (feeds,) = model.calibration.batches(40)
    a, tiny, b = (next(s for s in sites if s.weight.name == n).matrix().T for n in ("a", "tiny", "b"))
    lost = np.maximum(feeds["x"] @ a, 0) @ a @ b
    y = lost + feeds["x"] @ tiny @ b
    assert whole == pytest.approx((lost**2).sum() / (y**2).sum(), rel=1e-3)


def test_masks_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    model.cache = Cache(tmp_path)
    sites = find_sites(model.ir)
    first = masked_sensitivity(model, sites, [SPECS] * 3, disturb="output")
    monkeypatch.setattr(_Masks, "losses", None)
    again = masked_sensitivity(model, sites, [SPECS] * 3, disturb="output")
    for a, b in zip(first.loss, again.loss, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_refused() -> None:
    model = model_of()
    sites = find_sites(model.ir)
    for share, draws in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="give a share"):
            masked_sensitivity(model, sites, [SPECS] * 3, disturb="output", share=share, draws=draws)
    model.calibration = None
    with pytest.raises(BadData, match="no calibration data"):
        masked_sensitivity(model, sites, [SPECS] * 3)
