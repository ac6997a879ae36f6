from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompiler.budget import bits_per_weight, lowered_bytes, stored_bytes
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import parse_spec
from qcompiler.graph.functions import rounds_rows
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.lorc import LoRC
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.passes.transform.row_error import RowError
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.passes.transform.svd_smoothing import exponents
from qcompiler.passes.transform.svdquant import SVDQuant
from qcompiler.pipeline import Pass, PassReport, Pipeline
from qcompiler.plan import SitePlan
from tests.graph.architectures import ARCHITECTURES, HEADS, LAYERS
from tests.passes.round.small_models import build, cnn, planned
from tests.passes.transform.gated import WIDTH, artifact_error, gated
from tests.passes.transform.loud import loud_model

SPEC = "int4-sym-g16-fp16"


def run(model: Model, *passes: Pass) -> list[PassReport]:
    return Pipeline(list(passes)).run(model)


def svdquant(**options: Any) -> SVDQuant:
    usual: dict[str, Any] = {"rank": 3, "share": 16.0, "spec": SPEC, "grid": 3}
    return SVDQuant(**usual | options)


def error(model: Model, *passes: Pass) -> float:
    """What passes and rounding do to the output on new data, relative to its power."""
    x = {"x": np.random.default_rng(99).standard_normal((16, 8, WIDTH)).astype(np.float32)}
    exact = Runner(model.ir)(x)["y"]
    copy = model.clone()
    run(copy, *passes, Nearest(), InsertQDQ())
    return float(np.square(Runner(copy.ir)(x)["y"] - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_function_is_kept_on_every_architecture(name: str) -> None:
    """The pipeline holds the pass to its contract, outliers included; what has no branch says why."""
    model = loud_model(name)
    products = [
        s for s in find_sites(model.ir) if s.op in ("MatMul", "Gemm") and len(s.users) == 1 and len(s.shape) == 2
    ]
    report = run(model, svdquant())[0]
    assert report.changed == len(products) == len(report.metrics.get("branches", {}))
    assert {s.name for s in find_sites(model.ir) if s.branch} == {s.name for s in products}
    sites = [s.name for s in find_sites(model.ir) if s.op != "Gather"]
    reasons = {refusal.where: refusal.reason for refusal in report.refused if refusal.reason.startswith("no branch")}
    assert set(reasons) == set(sites) - {s.name for s in products}


def test_outliers_go_into_the_branch_and_activations_are_rounded_finer() -> None:
    """The paper's order on one gated MLP at 4-bit weights and activations, and none of it without outliers."""
    plan = Uniform(SPEC, "dynamic", activation_bits=4)
    chain = svdquant(rank=4, grid=6, activation_bits=4)
    loud, quiet = gated(30.0), gated(1.0)
    naive, smooth, both = (error(loud, *passes, plan) for passes in ((), (Smooth(),), (chain,)))
    unsmoothed = error(loud, svdquant(rank=4, smoothing=False, activation_bits=4), plan)
    assert both < 0.8 * smooth
    assert smooth < 0.8 * naive
    assert both < 0.8 * unsmoothed
    gains = [error(model, plan) / error(model, chain, plan) for model in (loud, quiet)]
    assert gains[0] > 3
    assert gains[1] < 1.5


def test_readers_of_one_value_share_the_first_product_and_bytes_are_counted() -> None:
    model = loud_model("llama-gqa")
    report = run(model, svdquant(rank=2), Uniform(SPEC, embeddings="float"))[0]
    first = [n for n in model.graph.initializers if n.endswith("_branch0")]
    second = [n for n in model.graph.initializers if n.endswith("_branch1")]
    assert len(first) == 4 * LAYERS + 1  # q, k and v share one, so do gate and up
    assert len(second) == 7 * LAYERS + 1
    sites = {site.name: site for site in find_sites(model.ir)}
    facts = report.metrics["branches"]
    assert facts["0.q"]["bytes"] == 2 * 2 * (16 + 16)
    assert facts["0.k"]["bytes"] == 2 * 2 * 4 * HEADS // 2
    assert {name: site.branch_bits for name, site in sites.items() if site.branch} == {
        name: 8 * fact["bytes"] for name, fact in facts.items()
    }
    counted = stored_bytes(model)
    run(model, Nearest(), InsertQDQ())
    assert lowered_bytes(model.ir) == counted


def test_ranks_are_limited_by_what_a_branch_may_store() -> None:
    facts = run(gated(10.0), svdquant(rank=32, share=1.0))[0].metrics["branches"]
    assert facts["gate"]["rank"] == WIDTH * 192 // (16 * (WIDTH + 192))
    assert facts["gate"]["bytes"] + facts["up"]["bytes"] <= WIDTH * 192 / 8
    none = run(gated(10.0), svdquant(share=0.1))[0]
    assert not none.changed
    reasons = {refusal.reason for refusal in none.refused}
    assert reasons == {"no branch: one of rank 1 stores more than 0.1 bits per weight"}
    large = run(gated(10.0), svdquant(rank=64, share=99.0))[0]
    assert {refusal.reason for refusal in large.refused if "64" in refusal.reason} == {
        "no branch: one of rank 64 is no smaller than the weights"
    }


def test_factors_of_8_bits_hold_twice_the_rank_and_lose_less() -> None:
    """At the same bytes, steps counted; the function is kept all the same."""
    models = [gated(10.0), gated(10.0)]
    facts = [
        run(model, svdquant(rank=32, share=0.7, factor_bits=bits))[0].metrics["branches"]
        for model, bits in zip(models, (16, 8), strict=True)
    ]
    for name in ("gate", "up", "down"):
        wide, narrow = (found[name] for found in facts)
        assert 2 * wide["rank"] - 1 <= narrow["rank"] <= 2 * wide["rank"] + 1
        assert narrow["error"] < wide["error"]
    sites = {site.name: site for site in find_sites(models[1].ir)}
    rank = facts[1]["gate"]["rank"]
    assert facts[1]["gate"]["bytes"] == rank * (WIDTH + 96 + 4)
    assert sites["gate"].branch_bits == 8 * facts[1]["gate"]["bytes"]
    assert sites["up"].branch_bits == 8 * rank * 96
    run(models[1], Uniform(SPEC, embeddings="float"), Nearest())
    counted = stored_bytes(models[1])
    run(models[1], InsertQDQ())
    assert lowered_bytes(models[1].ir) == counted
    for kind in (SVDQuant, LoRC):
        with pytest.raises(BadOption, match="no factors of 4 bits"):
            kind(factor_bits=4)  # type: ignore[arg-type]


def test_the_branch_reads_the_activation_before_it_is_rounded() -> None:
    model = gated(10.0)
    run(model, Uniform(SPEC, "dynamic", activation_bits=4), svdquant(spec=""), Nearest(), InsertQDQ())
    rounding = [node for node in model.graph if rounds_rows(node)]
    assert len(rounding) == 2
    for node in rounding:
        users = [user for user in node.outputs[0].consumers() if user.op_type == "MatMul"]
        assert not any("branch" in str(user.name) for user in users)
        assert node.inputs[0] is not None
        assert any("branch" in str(user.name) for user in node.inputs[0].consumers())


def test_a_plan_says_the_formats() -> None:
    """The search is for the planned format: a wide one leaves little to gain, and floats get no branch."""
    model = gated(30.0)
    model.plan = planned(model, SPEC).plan.with_sites({"gate": SitePlan(None)})
    facts = run(model, svdquant(spec=""))[0].metrics["branches"]
    assert set(facts) == {"up", "down"}
    assert all(fact["error"] < 1 for fact in facts.values())


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()], ids=["nearest", "gptq"])
def test_any_rounding_pass_rounds_the_rest(rounding: Pass) -> None:
    model = gated(30.0)
    x = next(model.calibration.batches(8)) if model.calibration else {}
    exact = Runner(model.ir)(x)["y"]
    run(model, svdquant(rank=4), Uniform("int4-sym-g16-fp16"), rounding, InsertQDQ())
    assert np.square(Runner(model.ir)(x)["y"] - exact).sum() < 0.01 * np.square(exact).sum()


def with_product(weight: np.ndarray, op: str = "MatMul", **attributes: Any) -> Model:
    """x [batch, 64] -> one product."""
    rng = np.random.default_rng(5)
    nodes = [helper.make_node(op, ["x", "a.weight"], ["y"], name="a", **attributes)]
    data = {"x": rng.standard_normal((12, WIDTH)).astype(np.float32)}
    return build(nodes, {"a.weight": weight.astype(np.float32)}, {"x": ["batch", WIDTH]}, ["y"], data)


def tied() -> Model:
    nodes = [helper.make_node("MatMul", [v, "a.weight"], [w], name=w) for v, w in (("x", "h"), ("h", "y"))]
    data = {"x": normal(12, WIDTH)}
    return build(nodes, {"a.weight": normal(WIDTH, WIDTH)}, {"x": ["batch", WIDTH]}, ["y"], data)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).standard_normal(shape).astype(np.float32)


def spoiled() -> Model:
    weight = normal(WIDTH, 32)
    weight[3, 4] = np.nan
    return with_product(weight)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: with_product(np.zeros((WIDTH, 32))), "its weight is zero"),
        (spoiled, "its weight holds NaN or infinity"),
        (lambda: with_product(normal(WIDTH, 32) * 1e20), "float16 cannot hold it"),
        (lambda: with_product(normal(WIDTH, 32), "Gemm", alpha=0.5), "its Gemm multiplies by a number"),
        (tied, "several operations read the weight"),
        (cnn, "only products with one matrix have them"),
    ],
    ids=["zero", "nan", "overflow", "alpha", "tied", "convolution"],
)
def test_what_can_have_no_branch_is_refused(make: Callable[[], Model], said: str) -> None:
    model = make()
    report = Pipeline([svdquant()], verify=False).run(model)[0]
    assert f"no branch: {said}" in {refusal.reason for refusal in report.refused}
    assert not any(site.branch for site in find_sites(model.ir) if site.name == "a")


def test_a_second_branch_is_refused_and_so_are_transforms_behind_one() -> None:
    model = loud_model("llama")
    run(model, svdquant())
    again = run(model, svdquant())[0]
    assert not again.changed
    assert "no branch: it has one" in {refusal.reason for refusal in again.refused}
    for item in (Smooth(sites="all"), Rotate()):
        report = run(model, item)[0]
        assert not report.changed
        assert any("put transforms before" in refusal.reason for refusal in report.refused)


def test_what_cannot_be_smoothed_gets_a_branch_all_the_same() -> None:
    model = with_product(normal(WIDTH, 48))
    report = run(model, svdquant())[0]
    assert report.changed == 1
    assert [r.reason for r in report.refused] == ["not smoothed: 'x' is an input of the graph"]


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((4, 8, WIDTH)),
        np.ones((4, 8, WIDTH)) * np.arange(WIDTH),
        normal(1, 8, WIDTH),
        normal(2, 8, WIDTH) * 1e6,
    ],
    ids=["zero", "constant", "one sample", "large"],
)
def test_poor_calibration_data_is_no_obstacle(data: np.ndarray) -> None:
    model = gated(10.0)
    model.calibration = Calibration.from_arrays({"x": data.astype(np.float32)}, model.ir)
    report = run(model, svdquant(activation_bits=4))[0]
    assert report.changed + len(report.refused) >= 2  # the readers of the norm, and what reads their product
    assert all(np.isfinite(site.matrix()).all() for site in find_sites(model.ir))


def test_options_that_mean_nothing_are_refused() -> None:
    for options in (
        {"rank": 0},
        {"share": -1.0},
        {"grid": 0},
        {"sweeps": 0},
        {"spec": "int99"},
        {"activation_bits": 99},
    ):
        with pytest.raises(BadOption):
            run(gated(), svdquant(**options))
    with pytest.raises(BadOption, match="neither a plan nor an option"):
        run(gated(), svdquant(spec=""))
    with pytest.raises(BadOption, match="there is a plan"):
        run(planned(gated(), SPEC), svdquant())
    with pytest.raises(BadOption, match="not 'activation_bits'"):
        run(planned(gated(), SPEC), svdquant(spec="", activation_bits=4))
    model = gated()
    model.calibration = None
    with pytest.raises(PassRefused, match="needs calibration data"):
        run(model, svdquant())
    with pytest.raises(PassRefused, match="rounded already"):
        run(gated(), Uniform(SPEC), Nearest(), svdquant(spec=""))


def test_allocation_counts_the_branches_in_its_budget() -> None:
    model = gated(30.0)
    run(model, svdquant(rank=2, share=9.0), Allocate("4.7bits", bits=(2, 3, 4, 8)))
    bits = bits_per_weight(model)
    assert bits is not None
    assert 4.0 < bits <= 4.7
    branches = sum(site.branch_bits for site in find_sites(model.ir))
    assert branches == 16 * 2 * (WIDTH + 2 * 96 + 96 + WIDTH)
    counted = stored_bytes(model)
    run(model, Nearest(), InsertQDQ())
    assert lowered_bytes(model.ir) == counted


def test_rows_that_do_not_fit_into_memory_together_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = gated(30.0), gated(30.0)
    found = run(whole, svdquant())[0].metrics
    monkeypatch.setattr("qcompiler.passes.transform.row_error._TOGETHER", 1)
    assert set(run(parts, svdquant())[0].metrics["branches"]) == set(found["branches"])
    for one, other in zip(find_sites(whole.ir), find_sites(parts.ir), strict=True):
        assert np.abs(one.matrix() - other.matrix()).max() < 0.1 * np.abs(one.matrix()).max()


def test_the_error_is_that_of_the_product_beside_an_exact_branch() -> None:
    x, rest = normal(20, WIDTH) * 3, normal(8, WIDTH)
    after = (np.round(rest * 4) / 4).astype(np.float32)
    plain = RowError.of(x, SitePlan(parse_spec(SPEC)))
    assert plain(rest, after) == pytest.approx(np.square(x @ (rest - after).T).sum(), rel=1e-4)
    seen = RowError.of(x, SitePlan(parse_spec(SPEC), "dynamic", activation_bits=4))
    step = np.abs(x).max(1, keepdims=True) / 7
    rounded = np.round(x / step) * step
    assert seen(rest, after) == pytest.approx(np.square(x @ rest.T - rounded @ after.T).sum(), rel=1e-3)


def test_the_grid_is_the_papers() -> None:
    pairs = exponents(20)
    assert len(pairs) == len(set(pairs)) == 39
    assert all(b in (0.0, pytest.approx(1 - a)) for a, b in pairs)


TOML = """
[[pass]]
name = "svdquant"
spec = "int4-sym-g16-fp16"
share = 4.0
rank = 4
grid = 3
factor_bits = {bits}

[[pass]]
name = "uniform"
spec = "int4-sym-g16-fp16"
activation = "{activation}"

[[pass]]
name = "nearest"

[[pass]]
name = "insert-qdq"
"""


@pytest.mark.parametrize(("activation", "bits"), [("float", 16), ("dynamic", 16), ("dynamic", 8)])
@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_artifacts_with_branches(
    target: str, activation: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling verifies that the artifact does what the lowered graph says."""
    if target == "cpu":
        pytest.importorskip("tvm")
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    assert artifact_error(gated(20.0), TOML.format(activation=activation, bits=bits), target, tmp_path) < 0.02
