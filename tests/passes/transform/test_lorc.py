from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.branches import DOWN, UP
from qcompiler.graph.codes import DOMAIN
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.gram import grams
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.lorc import LoRC
from qcompiler.passes.transform.svdquant import SVDQuant
from qcompiler.pipeline import Pass, PassReport, Pipeline
from tests.graph.architectures import ARCHITECTURES, feeds_for, inject_outliers
from tests.passes.round.small_models import cnn, planned
from tests.passes.transform.gated import artifact_error, gated

SPEC = "int3-sym-g16-fp16"


def lorc(saliency: str = "input", **options: Any) -> LoRC:
    usual: dict[str, Any] = {"saliency": saliency, "rank": 3, "share": 16.0}
    return LoRC(**usual | options)


def run(model: Model, *passes: Pass) -> list[PassReport]:
    return Pipeline(list(passes)).run(model)


def cost(outliers: float, *passes: Pass) -> dict[str, float]:
    """E||x (W' - W)^T||^2 of each site's rounded weight with its branch, over that of rounding alone."""
    model = planned(gated(outliers), SPEC)
    known = grams(model, find_sites(model.ir))
    exact = {site.name: site.matrix() for site in find_sites(model.ir)}
    plain = model.clone()
    run(plain, Nearest())
    run(model, *passes)
    found: dict[str, float] = {}
    for site in find_sites(model.ir):
        left = model.weights[site.name].decode() + product(model, site) - exact[site.name]
        before = plain.weights[site.name].decode() - exact[site.name]
        found[site.name] = known[site.name].error(left) / known[site.name].error(before)
    return found


def product(model: Model, site: Site) -> np.ndarray:
    """U V of a site's branch."""
    up = model.graph.initializers[f"{site.weight.name}_branch1"]
    (call,) = up.consumers()
    assert (call.domain, call.op_type) == (DOMAIN, UP)
    assert call.inputs[0] is not None
    shared = call.inputs[0].producer()
    assert shared is not None
    assert (shared.domain, shared.op_type) == (DOMAIN, DOWN)
    assert shared.inputs[1] is not None
    return (constant(shared.inputs[1]) @ constant(up)).T


def constant(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma", "vit", "resnet"])
def test_the_float_function_is_kept(name: str, behind: bool) -> None:
    graph = ARCHITECTURES[name]()
    inject_outliers(graph)
    model = Model(graph, name, Calibration.from_arrays(feeds_for(graph, batch=8), graph))
    products = [s for s in find_sites(graph) if s.op in ("MatMul", "Gemm") and len(s.users) == 1 and len(s.shape) == 2]
    before = Runner(model.ir)(feeds_for(graph, loud=True))
    passes = (Nearest(), lorc()) if behind else (lorc(), Nearest())
    reports = run(model, Uniform("int3-sym-g8-fp16", embeddings="float"), *passes)
    assert max(report.changed for report in reports if report.name == "lorc") == len(products)
    after = Runner(model.ir)(feeds_for(graph, loud=True))
    for key, array in before.items():
        assert np.abs(after[key] - array).max() <= 1e-5 * np.abs(array).max()


@pytest.mark.parametrize("behind", [False, True])
def test_saliences_are_ordered_by_what_they_know(behind: bool) -> None:
    def of(saliency: str) -> dict[str, float]:
        return cost(20.0, *((Nearest(), lorc(saliency)) if behind else (lorc(saliency), Nearest())))

    plain, slim, full = of("plain"), of("slim"), of("input")
    for name in ("gate", "up"):
        assert full[name] < 1.02 * slim[name]
        assert slim[name] < 0.5 * plain[name]
        assert plain[name] < 1


def test_control_without_outliers_saliences_are_alike_and_gain_little() -> None:
    plain, full = (cost(1.0, Nearest(), lorc(saliency)) for saliency in ("plain", "input"))
    for name in ("gate", "up"):
        assert full[name] == pytest.approx(plain[name], abs=0.05)
        assert full[name] > 0.75


def test_behind_rounding_the_codes_stay_and_the_branch_makes_up_for_them() -> None:
    model = planned(gated(20.0), SPEC)
    run(model, GPTQ())
    codes = dict(model.weights)
    weights = {site.name: site.matrix() for site in find_sites(model.ir)}
    run(model, lorc())
    assert all(model.weights[name] is tensor for name, tensor in codes.items())
    for site in find_sites(model.ir):
        assert np.allclose(site.matrix() + product(model, site), weights[site.name], atol=1e-6)


def test_a_common_first_factor_stores_less() -> None:
    both = [cost(20.0, lorc(common=common), Nearest()) for common in (True, False)]
    bits = []
    for common in (True, False):
        model = planned(gated(20.0), SPEC)
        run(model, lorc(common=common))
        bits.append(sum(site.branch_bits for site in find_sites(model.ir)))
    assert bits[0] == bits[1] - 16 * 3 * 64
    assert both[0]["gate"] < 2 * both[1]["gate"]


def test_sites_that_can_have_none_say_why() -> None:
    model = planned(cnn(), "int4-sym-channel-fp16")
    report = run(model, lorc(rank=1))[0]
    assert report.changed == 1
    assert {r.reason for r in report.refused} == {"no branch: only products with one matrix have them"}
    model = planned(gated(20.0), SPEC)
    run(model, Nearest())
    for site in find_sites(model.ir):  # a weight that its codes hold
        site.weight.const_value = ir.tensor(site.from_matrix(model.weights[site.name].decode()), name=site.weight.name)
    report = run(model, lorc())[0]
    assert not report.changed
    assert {r.reason for r in report.refused} == {"no branch: it would not lower the cost of rounding"}


def test_order_and_data_are_asked_for() -> None:
    with pytest.raises(PassRefused, match="no plan"):
        run(gated(), lorc())
    with pytest.raises(BadOption, match="rank"):
        lorc(rank=0)
    with pytest.raises(BadOption, match="share"):
        lorc(share=-0.5)
    model = planned(gated(20.0), SPEC)
    model.calibration = None
    for saliency in ("input", "slim"):
        with pytest.raises(PassRefused, match="needs calibration data"):
            run(model, lorc(saliency))
    assert run(model, lorc("plain"))[0].changed == 3
    run(model, Nearest(), InsertQDQ())
    with pytest.raises(PassRefused, match="lowered already"):
        run(model, lorc("plain"))


def test_behind_a_bias_correction_it_is_refused() -> None:
    model = planned(gated(20.0), SPEC)
    report = run(model, Nearest(), BiasCorrection(), lorc())[-1]
    assert set(model.bias_shift) <= {r.where for r in report.refused if "bias is corrected" in r.reason}
    assert report.changed == 3 - len(model.bias_shift)
    assert model.bias_shift


def test_beside_a_branch_of_svdquant_there_is_no_second() -> None:
    model = gated(20.0)
    report = run(model, SVDQuant(rank=2, share=9.0, spec=SPEC, grid=2), Uniform(SPEC), Nearest(), lorc())[-1]
    assert {r.reason for r in report.refused} == {"no branch: it has one"}


TOML = """
[[pass]]
name = "uniform"
spec = "int4-sym-g16-fp16"
activation = "{activation}"

[[pass]]
name = "gptq"

[[pass]]
name = "lorc"
rank = 3
share = 2.0
"""


@pytest.mark.parametrize("activation", ["float", "static"])
@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_artifacts(target: str, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling verifies that the artifact does what the lowered graph says."""
    if target == "cpu":
        pytest.importorskip("tvm")
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    ranges = '\n[[pass]]\nname = "activation-ranges"\n' if activation == "static" else ""
    text = TOML.format(activation=activation) + ranges + '\n[[pass]]\nname = "insert-qdq"\n'
    assert artifact_error(gated(20.0), text, target, tmp_path) < 0.03
