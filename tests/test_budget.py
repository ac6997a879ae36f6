from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.budget import (
    bits_per_weight,
    breakdown,
    kept_sites,
    lowered_bytes,
    parse_budget,
    stored_bytes,
    weight_bits,
)
from qcompiler.errors import BadOption
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.plan import Plan, SitePlan


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("3.5bits", "bits", Fraction(7, 2)),
        ("3.5 bit", "bits", Fraction(7, 2)),
        (" 0.1bits ", "bits", Fraction(1, 10)),
        ("120MB", "bytes", 120 * 10**6),
        ("120mb", "bytes", 120 * 10**6),
        ("1.5GiB", "bytes", 3 * 2**29),
        ("120MiB", "bytes", 120 * 2**20),
        ("89.9e6B", "bytes", 89_900_000),
        ("64kB", "bytes", 64_000),
        ("10bytes", "bytes", 10),
        ("8ms", "seconds", Fraction(8, 1000)),
        ("2.5 s", "seconds", Fraction(5, 2)),
        ("900us", "seconds", Fraction(9, 10_000)),
        ("8ms@4", "seconds", Fraction(8, 1000)),
        ("1.2Gbops", "bops", 12 * 10**8),
        ("300MBOPs", "bops", 3 * 10**8),
        ("7bops", "bops", 7),
    ],
)
def test_budgets_are_read_exactly(text: str, kind: str, amount: Fraction) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert str(budget) == text.strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8ms@cpu", "no number of samples"),
        ("8ms@", "no number of samples"),
        ("8ms@0", "no number of samples"),
        ("8ms@-1", "no number of samples"),
        ("8ms@1000000", "no number of samples from 1 to 999999"),
        ("8MB@2", "only a latency"),
        ("1Gbops@2", "only a latency"),
        ("8ns", "no known unit"),
        ("0ms", "not a positive amount"),
        ("3.5b", "no known unit"),
        ("120Mb", "no known unit"),
        ("4", "no known unit"),
        ("3,5bits", "no known unit"),
        ("", "not an amount"),
        ("\u0663bits", "not an amount"),  # an Arabic three
        ("bits", "not an amount"),
        ("nanbits", "not a positive amount"),
        ("infMB", "not a positive amount"),
        ("-3bits", "not a positive amount"),
        ("0MB", "not a positive amount"),
        ("1e999bits", "not a positive amount"),
        ("1e-999bits", "not a positive amount"),
        ("9" * 100 + "bits", "not an amount"),
        ("1e99999999bits", "budget"),
    ],
)
def test_what_is_no_budget_says_why_and_what_to_write(text: str, reason: str) -> None:
    with pytest.raises(BadOption, match=reason) as caught:
        parse_budget(text)
    assert "3.5bits" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "amount", "shown"),
    [
        ("3bits", Fraction(9, 4), "2.2500bits"),
        ("3bits", Fraction(1, 3), "0.3334bits"),
        ("1MB", Fraction(1_234_567), "1.23457MB"),
        ("1B", Fraction(1_234_567), "1234567B"),
        ("1MiB", Fraction(2**20 * 100 + 1), "100.001MiB"),
        ("1ms", Fraction(123_456, 10**7), "12.35ms"),
        ("1us", Fraction(123_456, 10**7), "12346us"),
        ("8ms@4", Fraction(1, 1000), "1.000ms@4"),
        ("1Gbops", Fraction(1_234_567_891), "1.23457Gbops"),
        ("1bops", Fraction(12), "12bops"),
    ],
)
def test_amounts_are_shown_rounded_up(text: str, amount: Fraction, shown: str) -> None:
    assert parse_budget(text).show(amount) == shown
    assert parse_budget(shown).amount >= amount


@pytest.mark.parametrize(("text", "resource", "stored"), [
    ("3bits", "bits", True), ("1MB", "bytes", True), ("8ms", "seconds", False), ("8ms@4", "seconds@4", False),
    ("1Gbops", "bops", False),
])  # fmt: skip
def test_budgets_of_one_resource_have_one_name(text: str, resource: str, stored: bool) -> None:
    budget = parse_budget(text)
    assert (budget.resource, budget.stored) == (resource, stored)


def small_model() -> Model:
    """Embedding [10, 6] tied with the head (through Transpose), a Gemm [6, 6] with bias, a lone constant."""
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.normal(size=(10, 6)).astype(np.float32),
        "fc.weight": rng.normal(size=(6, 6)).astype(np.float32),
        "fc.bias": rng.normal(size=6).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="embed"),
        helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["h"], name="fc", transB=1),
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2.0, np.float32), "two")),
        helper.make_node("Mul", ["h", "two"], ["h2"], name="double"),
        helper.make_node("Transpose", ["table"], ["head"], name="flip", perm=[1, 0]),
        helper.make_node("MatMul", ["h2", "head"], ["y"], name="lm_head"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Model(ir.from_proto(proto), name="small")


def test_bits_and_bytes_count_everything_once() -> None:
    model = small_model()
    table, fc = (site.name for site in find_sites(model.ir))
    plan = Plan({table: SitePlan(parse_spec("uint3-asym-g4-fp16")), fc: SitePlan(parse_spec("int8-sym-channel-fp32"))})
    # table: 60 codes in planes of 2 and 1 bits (15 + 8 bytes), 20 scales of 2 bytes, 20 zeros (5 + 3 bytes)
    table_bytes = 15 + 8 + 40 + 8
    fc_bytes = 36 + 6 * 4
    assert weight_bits(model, plan) == (8 * (table_bytes + fc_bytes), 96)
    assert bits_per_weight(model, plan) == 8 * (table_bytes + fc_bytes) / 96
    assert stored_bytes(model, plan) == table_bytes + fc_bytes + 6 * 4 + 4  # and the bias, and the Constant
    rows = breakdown(model, plan)
    assert [(r.what, r.weights, r.bytes) for r in rows] == [
        ("embedding", 60, table_bytes),
        ("weight", 36, fc_bytes),
        ("other", 0, 28),
    ]
    assert [r.spec for r in rows] == ["uint3-asym-g4-fp16", "int8-sym-channel-fp32", "float"]


def test_float_weights_count_their_dtype_and_an_empty_plan_the_file() -> None:
    model = small_model()
    assert bits_per_weight(model) == 32
    assert stored_bytes(model) == lowered_bytes(model.ir) == 4 * (60 + 36 + 6 + 1)


def test_kept_sites_are_outside_the_average_and_inside_the_bytes() -> None:
    model = small_model()
    sites = find_sites(model.ir)
    table, fc = (site.name for site in sites)
    assert kept_sites(sites, ["embeddings"]) == (table,)
    assert kept_sites(sites, ["f*", fc]) == (fc,)
    assert kept_sites(sites, [sites[0].weight.name or "?"]) == (table,)
    spec = SitePlan(parse_spec("int4-sym-channel-fp16"))
    plan = Plan({table: spec, fc: spec}, kept=(table,))
    assert weight_bits(model, plan) == (36 * 4 + 6 * 16, 36)
    assert stored_bytes(model, plan) == 240 + 18 + 12 + 28
    assert breakdown(model, plan)[0].what == "kept"


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(BadOption, match="'layers\\.\\*' matches no site"):
        kept_sites(find_sites(small_model().ir), ["layers.*"])


def test_plans_keep_their_kept_sites_in_json() -> None:
    plan = Plan({"a": SitePlan(parse_spec("int4"))}, {"gap": 0.0}, ("b",))
    assert Plan.from_json(plan.to_json()) == plan
