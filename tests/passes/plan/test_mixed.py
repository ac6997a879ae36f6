"""Groups of two widths in allocation: what is offered, one threshold over all sites, the whole way to an artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompiler.backends.onnx.backend import OnnxBackend
from qcompiler.backends.onnx.session import OrtRunnable, reference_options
from qcompiler.budget import lowered_bytes, parse_budget, stored_bytes, weight_bits
from qcompiler.errors import BadOption
from qcompiler.formats import Int, PerChannel, PerGroup, Promoted, QuantSpec
from qcompiler.formats.fit import quantize
from qcompiler.formats.promotion import group_errors
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.blocks import block_scores, choose_blocks
from qcompiler.measure.curvature import Fisher
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import menu, target_for
from qcompiler.passes.plan.mixed import SHARES, mixed_plans, parse_mixed
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent
from qcompiler.solvers.problem import Problem
from qcompiler.solvers.solve import solve
from tests.passes.round.small_models import build, cnn, planned

SIZES = {"a": (64, 128), "b": (128, 96), "c": (96, 64)}


def chain() -> Model:
    """Three products, each with rows of very different size, so that some groups matter far more than others."""
    rng = np.random.default_rng(5)
    weights = {
        n: (rng.standard_normal(s) * rng.lognormal(0, 1.2, (1, s[1])) / 16).astype(np.float32) for n, s in SIZES.items()
    }
    data, nodes = "x", []
    for name in SIZES:
        nodes.append(helper.make_node("MatMul", [data, name], [f"{name}.product"], name=name))
        data = f"{name}.out" if name != "c" else "y"
        nodes.append(helper.make_node("Tanh", [f"{name}.product"], [data], name=f"{name}.tanh"))
    x = (rng.standard_normal((48, 64)) * rng.lognormal(0, 1, 64)).astype(np.float32)
    return build(nodes, weights, {"x": ["n", 64]}, ["y"], {"x": x})


def test_a_pair_stands_for_all_shares() -> None:
    assert parse_mixed(["int4to8"]) == tuple(Promoted(4, 8, share) for share in SHARES)
    assert parse_mixed(["int3to5p12.5", "int3to5p12.5"]) == (Promoted(3, 5, 12.5),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "one width"),
        ("int8to4", "promote no code"),
        ("fp4to8", "unknown format"),
        ("int4to8p200", "none or all"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        Allocate(mixed_blocks=(text,))


def test_columns_in_pairs_take_no_groups_of_two_widths() -> None:
    with pytest.raises(BadOption, match="whole widths"):
        Allocate(pairs=4, mixed_blocks=("int4to8",))


def test_a_menu_offers_the_pairs_where_the_target_takes_them() -> None:
    mixed = parse_mixed(["int4to8"])
    site = find_sites(chain().ir)[1]
    found = menu(OnnxBackend(), site, (3, 4, 5, 6, 8), (), "auto", mixed)
    formats = {p.weight.format for p in found.plans if p.weight is not None}
    assert formats >= set(mixed[:2])
    assert formats - set(mixed)
    assert found.bits() == sorted(found.bits())
    cpu = target_for("cpu", "auto")
    offered = cpu.candidates(site, (4, 8))
    plans, (refusal,) = mixed_plans(cpu, site, offered, mixed)
    assert (plans, refusal.where) == ([], "b")
    assert refusal.reason == "no groups of two widths: kernels exist for integers of 2 to 8 bits, not for int4to8p2"
    assert refusal in menu(cpu, site, (4, 8), (), "auto", mixed).refused
    assert found.refused == menu(cpu, site, (4, 8), (), "auto").refused == ()
    plain = menu(OnnxBackend(), site, (3, 4, 5, 6, 8), (), "auto")
    assert not any(isinstance(p.weight.format, Promoted) for p in plain.plans if p.weight is not None)


def test_without_groups_rows_are_promoted() -> None:
    mixed = (Promoted(4, 8, 25),)
    site = find_sites(cnn().ir)[0]  # a convolution of 27 columns
    offered = [SitePlan(QuantSpec(Int(4), PerChannel()), "static")]
    (plan,), _ = mixed_plans(OnnxBackend("static"), site, offered, mixed)
    assert (str(plan.weight), plan.activation) == ("int4to8p25-sym-channel-fp16", "static")


def losses(site: Site, information: Fisher, percents: list[float], low: QuantSpec, high: QuantSpec) -> list[float]:
    """1/2 sum F dW^2 of every share of promoted groups, which the same information chooses."""
    matrix, weights = site.matrix(), information.of(site)
    found: list[float] = []
    for percent in percents:
        mixed = replace(low, format=Promoted(4, 8, percent)) if 0 < percent < 100 else low if percent == 0 else high
        change = quantize(matrix, mixed, "mse", weights).decode().astype(np.float64) - matrix
        found.append(0.5 * float((weights * np.square(change)).sum()))
    return found


@pytest.mark.parametrize("low_fraction", [0.97, 0.9, 0.75, 0.5])
def test_an_allocation_of_shares_is_one_threshold_over_all_groups(low_fraction: float) -> None:
    """FGMP's choice, to the resolution of the shares: sensitive sites get more promoted groups by themselves."""
    sites, rng = find_sites(chain().ir), np.random.default_rng(1)
    importance = {
        site.name: (factor * rng.lognormal(0, 1, (site.rows, site.columns))).astype(np.float32)
        for site, factor in zip(sites, (1.0, 8.0, 0.2), strict=True)
    }
    information = Fisher(importance, {}, 1, {}, 1, 0.0)
    low, high = (QuantSpec(Int(b), PerGroup(16), True, "float32") for b in (4, 8))
    scores = {site.name: block_scores(site, information, low, high, block=16) for site in sites}
    chosen = choose_blocks(scores, low_fraction, masks=True)

    percents = [0.0, 1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 60, 70, 80, 90, 100]
    counts = [[round(p / 100 * scores[site.name].size) for p in percents] for site in sites]
    table = [losses(site, information, percents, low, high) for site in sites]
    for site, row, count in zip(sites, table, counts, strict=True):
        assert row == sorted(row, reverse=True)
        # The score of a group is twice what it loses: the price of a promotion is half the threshold.
        option = int(np.argmin(np.array(row) + chosen.threshold / 2 * np.array(count)))
        below, above = percents[max(option - 1, 0)], percents[min(option + 1, len(percents) - 1)]
        assert below <= 100 * chosen.fraction[site.name] <= above

    room = sum(s.size for s in scores.values()) - round(low_fraction * sum(s.size for s in scores.values()))
    costs = [[float(c) for c in count] for count in counts]
    solution = solve(Problem.ragged(table, {"promoted": costs}, {"promoted": float(room)}))
    assert chosen.masks is not None
    threshold_loss = 0.0
    for site in sites:
        rounded = [quantize(site.matrix(), spec, "mse", information.of(site)) for spec in (low, high)]
        errors = [group_errors(site.matrix(), tensor, information.of(site)) for tensor in rounded]
        threshold_loss += 0.5 * float(np.where(chosen.masks[site.name], errors[1], errors[0]).sum())
    assert solution.objective < 1.1 * threshold_loss  # shares are coarser than groups
    fractions = [chosen.fraction[site.name] for site in sites]
    assert fractions[1] > fractions[0] > fractions[2]


@pytest.mark.parametrize("spec", ["int3to8p15-g8", "int4to8p10-g16"])
def test_groups_that_the_fisher_information_chooses_lose_less_at_the_output(spec: str) -> None:
    pytest.importorskip("torch")
    errors: dict[str, float] = {}
    for importance in ("none", "fisher"):
        model = planned(chain(), spec)
        assert model.calibration is not None
        (feeds,) = model.calibration.batches(48)
        truth = Runner(model.ir)(feeds)["y"]
        Nearest(importance=importance, samples=48).run(model, Silent())
        InsertQDQ().run(model, Silent())
        errors[importance] = float(np.square(Runner(model.ir)(feeds)["y"] - truth).sum())
    assert errors["fisher"] < 0.7 * errors["none"]


@pytest.mark.parametrize("budget", ["3.8bits", "4.6bits"])
def test_allocation_with_two_widths_reaches_an_artifact_within_its_budget(budget: str, tmp_path: Path) -> None:
    model, plain = chain(), chain()
    exact = plain.ir.clone()
    options = {"budget": budget, "bits": (2, 3, 4, 5, 6, 8), "samples": 32}
    Allocate(**options, mixed_blocks=("int3to5", "int4to6")).run(model, Silent())  # type: ignore[arg-type]
    Allocate(**options).run(plain, Silent())  # type: ignore[arg-type]
    formats = [p.weight.format for p in model.plan.sites.values() if p.weight is not None]
    assert any(isinstance(fmt, Promoted) for fmt in formats)
    assert model.plan.solution["predicted_loss"] < plain.plan.solution["predicted_loss"]
    bits, weights = weight_bits(model)
    assert bits <= parse_budget(budget).amount * weights

    GPTQ(samples=48).run(model, Silent())
    counted = stored_bytes(model)
    InsertQDQ().run(model, Silent())
    assert lowered_bytes(model.ir) == counted
    ir.save(model.ir, tmp_path / "model.onnx")
    OnnxBackend().compile(model, tmp_path, Silent())
    assert plain.calibration is not None
    (feeds,) = plain.calibration.batches(48)
    got = OnnxBackend(threads=1).load(tmp_path).run(feeds)["y"]
    reference = OrtRunnable.open(tmp_path / "model.onnx", reference_options(1)).run(feeds)["y"]
    np.testing.assert_allclose(got, reference, atol=1e-5)
    ir.save(exact, tmp_path / "exact.onnx")
    truth = OrtRunnable.open(tmp_path / "exact.onnx", reference_options(1)).run(feeds)["y"]
    assert 0 < np.square(got - truth).sum() < 0.2 * np.square(truth).sum()
