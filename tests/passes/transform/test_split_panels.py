"""Panels of columns: the function stays, bytes are counted, joining is the inverse, and unequal columns gain."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnxruntime import InferenceSession

import qcompiler
from qcompiler.budget import stored_bytes
from qcompiler.build.recipe import Options, fill
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import QTensor, parse_spec
from qcompiler.graph.panels import find_cuts, find_sums
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.join_panels import JoinPanels
from qcompiler.passes.transform.panel_sizes import best_sizes, equal_sizes
from qcompiler.passes.transform.split_panels import SplitPanels
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent
from tests.passes.round.small_models import build
from tests.passes.transform.loud import loud_model, run

EQUAL = SplitPanels(align=8, least=16, cut="equal")


def two_layers(spread: float = 8.0, samples: int = 64, hidden: int = 128, kind: str = "MatMul") -> Model:
    """x [batch, 3, 96] -> hidden, with bias, Relu -> 64; the inputs of both layers differ by up to 2^spread."""
    rng = np.random.default_rng(0)
    power = np.exp2(rng.permutation(np.linspace(-spread / 2, spread / 2, 96)))
    shape: list[int | str] = ["batch", 96] if kind == "Gemm" else ["batch", 3, 96]
    rows = (samples * 3, 96) if kind == "Gemm" else (samples, 3, 96)
    x = (rng.standard_normal(rows) * power).astype(np.float32)
    strength = np.exp2(rng.permutation(np.linspace(-spread / 2, spread / 2, hidden)))
    first = rng.standard_normal((96, hidden)) * strength / np.sqrt(np.square(power).sum())
    weights = {
        "fc1.weight": first.astype(np.float32),
        "fc1.bias": (0.1 * rng.standard_normal(hidden) * strength).astype(np.float32),
        "fc2.weight": (rng.standard_normal((hidden, 64)) / 11).astype(np.float32),
    }
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "fc1.weight"], ["m"], name="fc1"),
        node("Add", ["m", "fc1.bias"], ["h"], name="add"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "fc2.weight"], ["y"], name="fc2"),
    ]
    if kind == "Gemm":
        weights["fc1.weight"] = np.ascontiguousarray(weights["fc1.weight"].T)
        nodes[:2] = [node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], name="fc1", transB=1, alpha=0.5)]
    return build(nodes, weights, {"x": shape}, ["y"], {"x": x})


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    session = InferenceSession(ir.to_proto(model.ir).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-fused", "gemma", "parallel", "vit", "mobilenet"])
def test_the_function_stays_and_joining_is_the_inverse(name: str) -> None:
    model = loud_model(name)
    whole = {site.name: site.matrix() for site in find_sites(model.ir)}
    facts = len(list(model.graph)), set(model.graph.initializers), stored_bytes(model)
    report = run(model, EQUAL)  # the Pipeline compares the functions
    cuts = find_cuts(model.graph, find_sites(model.ir))
    onnx.checker.check_model(ir.to_proto(model.ir), full_check=True)
    assert len(cuts) == report.changed > 0
    assert all(size % 8 == 0 for cut in cuts for size in cut.sizes[:-1])
    joined = run(model, JoinPanels())
    assert joined.changed == report.changed
    assert (len(list(model.graph)), set(model.graph.initializers), stored_bytes(model)) == facts
    folded = {cut["order"] for cut in report.metrics["panels"].values()} - {"gather"}
    for site in find_sites(model.ir):
        if not folded:
            np.testing.assert_array_equal(site.matrix(), whole[site.name])
        assert sorted(site.matrix().ravel()) == sorted(whole[site.name].ravel())


def test_bytes_of_orders_and_sizes_are_counted() -> None:
    model = loud_model("llama")
    before = stored_bytes(model)
    panels = run(model, EQUAL).metrics["panels"].values()
    added = sum(4 * sum(p["columns"]) * (p["order"] == "gather") + 8 * len(p["columns"]) for p in panels)
    assert stored_bytes(model) - before == added
    assert {p["order"] for p in panels} == {"gather", "folded"}


def test_readers_of_one_value_share_order_and_split() -> None:
    model = loud_model("llama")
    run(model, EQUAL)
    splits = [node for node in model.graph if node.op_type == "Split" and "split" in (node.name or "")]
    cuts = find_cuts(model.graph, find_sites(model.ir))
    assert len({cut.split for cut in cuts}) == len(splits) < len(cuts)


@pytest.mark.parametrize("order", ["costs", "salience"])
def test_costly_columns_come_first(order: str) -> None:
    model = two_layers()
    powers = np.square(next(iter(model.calibration.batches(64)))["x"]).mean((0, 1))  # type: ignore[union-attr]
    weights = np.square(find_sites(model.ir)[0].matrix()).sum(0)
    worth = powers * (weights if order == "salience" else 1)
    run(model, SplitPanels(order=order, cut="equal", least=96))  # type: ignore[arg-type]
    index = next(n for n in model.graph if n.op_type == "Gather").inputs[1]
    assert index is not None
    places = index.const_value.numpy()  # type: ignore[union-attr]
    correlation = np.corrcoef(np.arange(96), np.log(worth[places]))[0, 1]
    assert correlation < -0.9


def test_natural_order_needs_no_gather_and_no_data() -> None:
    model = two_layers()
    model.calibration = None
    report = Pipeline([SplitPanels(order="none", cut="equal", least=96)], verify=False).run(model)[0]
    assert [p["order"] for p in report.metrics["panels"].values()] == ["natural"] * 2
    assert not any(node.op_type == "Gather" for node in model.graph)


def test_gemms_keep_bias_and_factors() -> None:
    model = two_layers(kind="Gemm")
    assert run(model, SplitPanels(cut="equal", least=96)).changed == 2
    gemms = [node for node in model.graph if node.op_type == "Gemm"]
    assert [len(node.inputs) for node in gemms] == [3, 2, 2]
    assert run(model, JoinPanels()).changed == 2
    assert [s.name for s in find_sites(model.ir)] == ["fc1", "fc2"]


def test_what_is_not_cut_is_refused_with_a_reason() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.standard_normal((50, 64)).astype(np.float32),
        "few.weight": rng.standard_normal((64, 24)).astype(np.float32),
        "kept.weight": rng.standard_normal((64, 64)).astype(np.float32),
        "twice.weight": rng.standard_normal((64, 64)).astype(np.float32),
        "stack.weight": rng.standard_normal((1, 64, 64)).astype(np.float32),
        "last.weight": rng.standard_normal((24, 64)).astype(np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="table"),
        node("MatMul", ["e", "kept.weight"], ["k"], name="kept"),
        node("MatMul", ["k", "twice.weight"], ["t"], name="twice"),
        node("MatMul", ["t", "twice.weight"], ["u"], name="again"),
        node("MatMul", ["u", "stack.weight"], ["s"], name="stack"),
        node("MatMul", ["s", "few.weight"], ["f"], name="few"),
        node("MatMul", ["f", "last.weight"], ["y"], name="last"),
    ]
    ids = rng.integers(0, 50, (16, 5))
    model = build(nodes, weights, {"ids": ["batch", 5]}, ["y"], {"ids": ids})
    report = run(model, SplitPanels(least=32, align=16, keep=("kept",), cut="equal"))
    reasons = {refusal.where: refusal.reason for refusal in report.refused}
    assert report.changed == 1
    assert set(reasons) == {"table", "kept", "twice", "stack", "last"}
    for name, words in {"table": "Gather", "kept": "float", "twice": "2 operations", "last": "24 columns"}.items():
        assert words in reasons[name]


def test_bad_options_and_rounded_models_are_refused() -> None:
    for options in ({"panels": 1}, {"align": 0}, {"order": "size"}, {"cut": "half"}, {"gain": float("nan")}):
        with pytest.raises(BadOption):
            SplitPanels(**options)  # type: ignore[arg-type]
    model = two_layers()
    model.weights["fc1"] = QTensor(
        parse_spec("int4-sym-g32-fp16"), np.zeros((1, 1), np.int8), np.ones((1, 1), "f"), None
    )
    for item in (SplitPanels(), JoinPanels()):
        with pytest.raises(PassRefused, match="rounded already"):
            run(model, item)


def plans(model: Model, widths: dict[str, int]) -> None:
    model.plan = Plan({name: SitePlan(parse_spec(f"int{bits}-sym-g32-fp16")) for name, bits in widths.items()})


def test_only_neighbours_with_one_plan_are_joined() -> None:
    model = two_layers()
    run(model, SplitPanels(cut="equal", least=96))
    names = [site.name for site in find_sites(model.ir)]
    assert names == [f"fc{layer}.panel{place}" for layer in (1, 2) for place in range(3)]
    sizes = [site.columns for site in find_sites(model.ir)]
    plans(model, dict(zip(names, [8, 4, 4, 3, 3, 3], strict=True)))
    model.plan = Plan(model.plan.sites, kept=("elsewhere",))
    run(model, JoinPanels())
    sites = find_sites(model.ir)
    assert [(s.name, s.columns) for s in sites] == [
        ("fc1.panel0", sizes[0]),
        ("fc1.panel1", sizes[1] + sizes[2]),
        ("fc2", 128),
    ]
    assert {n: p.weight.bits for n, p in model.plan.sites.items() if p.weight} == {
        "fc1.panel0": 8,
        "fc1.panel1": 4,
        "fc2": 3,
    }
    assert model.plan.kept == ("elsewhere",)
    assert sum(node.op_type == "Gather" for node in model.graph) == 1


def test_a_kept_panel_stays_apart() -> None:
    model = two_layers()
    run(model, SplitPanels(cut="equal", least=96))
    plans(model, {f"fc2.panel{place}": 4 for place in range(3)})
    model.plan = Plan({n: p for n, p in model.plan.sites.items() if n != "fc2.panel0"}, kept=("fc2.panel0",))
    run(model, JoinPanels())
    assert [s.name for s in find_sites(model.ir)] == ["fc1", "fc2.panel0", "fc2.panel1"]
    assert model.plan.kept == ("fc2.panel0",)
    assert set(model.plan.sites) == {"fc2.panel1"}


def test_the_best_sizes_are_those_of_all_cuts() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        costs = np.sort(np.exp(3 * rng.standard_normal(40)))[::-1]
        found = best_sizes(costs, 3, 4, overhead=0.01, least=0.005)
        values: dict[tuple[int, ...], float] = {}
        for count in range(3):
            for ends in combinations(range(4, 40, 4), count):
                parts = np.split(costs, ends)
                loss = sum(len(p) * np.log2(p.mean()) for p in parts) / 80
                values[tuple(len(p) for p in parts)] = loss + 0.01 * (count > 0) + 0.005 * count
        assert values[found.columns] == pytest.approx(min(values.values())), seed
        assert best_sizes(1e-9 * costs, 3, 4, 0.01, 0.005).columns == found.columns


def test_equal_columns_are_not_cut() -> None:
    assert best_sizes(np.ones(128), 4, 32).columns == (128,)
    assert best_sizes(np.zeros(128), 4, 32, overhead=0.1).columns == (128,)
    assert best_sizes(np.repeat([4.0, 1.0], 64), 4, 32).columns == (64, 64)
    assert best_sizes(np.repeat([4.0, 1.0], 64), 4, 32, overhead=0.5).columns == (128,)
    assert equal_sizes(100, 3, 32) == (32, 32, 36)
    assert equal_sizes(40, 3, 32) == (40,)


def test_sums_are_of_products_only() -> None:
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((16, 16)).astype(np.float32) for i in range(4)}
    node = helper.make_node
    nodes = [
        *(node("MatMul", ["x", f"w{i}"], [f"m{i}"], name=f"m{i}") for i in range(4)),
        node("Add", ["m0", "m1"], ["s"]),
        node("Add", ["x", "m2"], ["r"]),
        node("Add", ["s", "r"], ["t"]),
        node("Add", ["t", "m3"], ["y"]),
    ]
    data = {"x": rng.standard_normal((4, 16)).astype(np.float32)}
    model = build(nodes, weights, {"x": ["batch", 16]}, ["y"], data)
    (found,) = find_sums(model.graph, find_sites(model.ir))
    assert [site.name for site in found.sites] == ["m0", "m1"]
    assert find_cuts(model.graph, find_sites(model.ir)) == []


def relative_error(model: Model, x: np.ndarray, exact: np.ndarray) -> float:
    InsertQDQ().run(model, Silent())
    return float(np.square(outputs(model, x) - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize("widths", [(4, 4, 4, 4, 4, 4), (8, 4, 2, 4, 3, 2)])
def test_gptq_lets_panels_make_up_for_each_other(widths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    model = two_layers()
    x = next(iter(model.calibration.batches(64)))["x"]  # type: ignore[union-attr]
    mixed = (x @ (np.eye(96) + rng.standard_normal((96, 96)) / 6)).astype(np.float32)  # so that columns are correlated
    model.calibration = Calibration.from_arrays({"x": mixed}, model.ir)
    exact = outputs(model, mixed)
    cut = model.clone()
    run(cut, SplitPanels(order="none", cut="equal", least=96))
    plans(cut, dict(zip([s.name for s in find_sites(cut.ir)], widths, strict=True)))
    alone = cut.clone()
    errors: dict[str, float] = {}
    run(cut, GPTQ())
    errors["together"] = relative_error(cut, mixed, exact)
    for site in find_sites(alone.ir):  # one at a time, the others left as they are
        single = alone.clone()
        single.plan = Plan({site.name: alone.plan.sites[site.name]})
        run(single, GPTQ())
        alone.weights[site.name] = single.weights[site.name]
    errors["alone"] = relative_error(alone, mixed, exact)
    assert errors["together"] < 0.8 * errors["alone"]
    if len(set(widths)) == 1:
        plans(model, {"fc1": 4, "fc2": 4})
        run(model, GPTQ())
        assert errors["together"] == pytest.approx(relative_error(model, mixed, exact), rel=0.03)


def compiled_errors(spread: float, target: str, folder: Path) -> dict[str, float]:
    """Relative squared errors of artifacts without panels, and with panels in no more bytes than these take."""
    model = two_layers(spread, hidden=384)
    x = next(iter(model.calibration.batches(64)))["x"]  # type: ignore[union-attr]
    exact = outputs(model, x)
    ends: list[Pass] = [GPTQ(), BiasCorrection(), InsertQDQ()]
    plan = Allocate(bits=(2, 3, 4, 6), samples=16, rerank=1)
    errors: dict[str, float] = {}
    limit = 30000
    for name, passes in {"whole": [plan], "panels": [SplitPanels(least=96), plan, JoinPanels()]}.items():
        result = qcompiler.compile(
            model, target, f"{limit}B", model.calibration, Pipeline([*passes, *ends]), output=folder / f"{name}.qc",
            activations="float",
        )  # fmt: skip
        assert 0.85 * limit < result.stored_bytes <= limit
        limit = result.stored_bytes
        found = result.run({"x": x})["y"]
        errors[name] = float(np.square(found - exact).sum() / np.square(exact).sum())
    return errors


@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_panels_gain_at_equal_bytes_where_columns_differ(target: str, tmp_path: Path) -> None:
    errors = compiled_errors(6.0, target, tmp_path)
    assert errors["panels"] < 0.75 * errors["whole"]


def test_panels_gain_little_where_columns_are_alike(tmp_path: Path) -> None:
    errors = compiled_errors(0.0, "onnx", tmp_path)
    assert errors["panels"] > 0.9 * errors["whole"]


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_panels_are_corrected_in_the_bias_of_their_sum(kind: str) -> None:
    model = two_layers(kind=kind)
    x = next(iter(model.calibration.batches(64)))["x"]  # type: ignore[union-attr]
    x = np.abs(x)  # so that errors have a mean
    model.calibration = Calibration.from_arrays({"x": x}, model.ir)
    exact = outputs(model, x)
    run(model, SplitPanels(order="none", cut="equal", least=96))
    plans(model, {f"fc1.panel{place}": 2 for place in range(3)})
    run(model, Nearest())
    offsets: list[float] = []
    for passes in ((), (BiasCorrection(),)):
        corrected = model.clone()
        for item in passes:
            assert run(corrected, item).changed == 3
        InsertQDQ().run(corrected, Silent())
        constants = [v.const_value for v in corrected.graph.initializers.values()]
        vectors = [c for c in constants if c is not None and c.shape == (128,) and c.dtype == ir.DataType.FLOAT]
        assert len(vectors) == 1  # no bias of their own
        error = (outputs(corrected, x) - exact).reshape(-1, 64)
        offsets.append(float(np.square(error.mean(0)).sum()))
    assert offsets[1] < 0.2 * offsets[0]


def test_what_is_to_stay_float_stays_whole() -> None:
    model = two_layers()
    pipeline = Pipeline([SplitPanels(cut="equal", least=96), Allocate(bits=(4,)), JoinPanels(), GPTQ(), InsertQDQ()])
    filled = fill(pipeline, Options("onnx", ("5bits",), ("fc1",), given=frozenset({"target", "budget", "keep"})))
    filled.run(model)
    assert model.plan.kept == ("fc1",)
    assert all(name.startswith("fc2") for name in model.plan.sites)
    assert [s.columns for s in find_sites(model.ir) if s.name.startswith("fc1")] == [96]


def test_readers_of_one_value_may_be_joined_apart() -> None:
    model = loud_model("llama")
    run(model, SplitPanels(align=4, least=16, cut="equal"))
    cuts = find_cuts(model.graph, find_sites(model.ir))
    shared = next(cut.split for cut in cuts if sum(c.split is cut.split for c in cuts) > 2)
    partly = next(cut for cut in cuts if cut.split is shared)
    widths = {site.name: 4 + place for cut in cuts for place, site in enumerate(cut.sum.sites)}
    plans(model, widths | {partly.sum.sites[1].name: 4})
    run(model, JoinPanels())  # the Pipeline compares the functions
    left = find_cuts(model.graph, find_sites(model.ir))
    assert sorted(len(cut.sizes) for cut in left) == [2, *[3] * (len(cuts) - 1)]
    names = [node.name for node in model.graph if node.op_type == "Split"]
    assert len(set(names)) == len(names)
