"""Allocate with a made-up target and made-up losses: everything else is real."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from qcompiler import registry
from qcompiler.budget import bits_per_weight, parse_budget, stored_bytes
from qcompiler.errors import BadOption, BudgetInfeasible, PassRefused
from qcompiler.formats import Int, PerChannel, PerGroup, QuantSpec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import menu, shortlist, site_bits
from qcompiler.pipeline import Pipeline
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent
from tests.passes.plan.made_up import Measured, Target, model, run, shrunk, use_target

FIND = registry.find


@pytest.mark.parametrize("budget", ["2.5bits", "3bits", "3.5bits", "4.123bits", "5bits", "8bits", "40bits"])
def test_best_plan_under_a_bits_budget(measured: Measured, budget: str) -> None:
    done, report = run(Allocate(budget))
    limit = parse_budget(budget).amount
    assert (bits_per_weight(done) or 99) <= limit
    assert report.metrics["bits_per_weight"] == bits_per_weight(done)
    facts = done.plan.solution
    sites = find_sites(done.ir)
    options = [measured.calls[0][1][i] for i in range(len(sites))]
    best = min(
        sum(measured.loss(s, p) for s, p in zip(sites, plans, strict=True))
        for plans in itertools.product(*options)
        if sum(site_bits(s, p) for s, p in zip(sites, plans, strict=True)) <= limit * sum(s.count for s in sites)
    )
    chosen = sum(measured.loss(s, done.plan.sites[s.name]) for s in sites)
    assert chosen == pytest.approx(best, rel=1e-6)
    assert facts["predicted_loss"] == pytest.approx(best, rel=1e-6)
    assert facts["lower_bound"] <= best * (1 + 1e-9)
    assert facts["gap"] < 1e-6
    assert facts["chosen"] == [bits_per_weight(done), facts["predicted_loss"]]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(facts["curve"]))
    assert Plan.from_json(done.plan.to_json()) == done.plan


def test_errors_that_cancel_change_the_plan(measured: Measured) -> None:
    """Two sites whose errors point in opposite directions may both be coarse; without the terms they are not."""
    measured.importance = {"q": 1.0, "k": 1.0, "v": 0.8, "out": 0.8, "wide": 1e-9}
    plain, _ = run(Allocate("3.5bits", loss="ablation"))
    measured.direction = {"q": np.full(16, 0.325), "k": np.full(16, -0.325)}  # alike in all parts
    with_terms, report = run(Allocate("3.5bits", rerank=1))
    ignored, _ = run(Allocate("3.5bits", loss="ablation"))
    assert ignored.plan.sites == plain.plan.sites != with_terms.plan.sites
    assert with_terms.plan.solution["predicted_loss"] < plain.plan.solution["predicted_loss"]
    assert report.metrics["measured"]["cross terms"]


def test_the_answer_that_is_truly_best_is_taken(measured: Measured) -> None:
    first, report = run(Allocate("4bits", rerank=1))
    assert report.metrics["runs"] == {}
    believed = dict(first.plan.sites)
    seen: list[bytes] = []

    def true(choice: np.ndarray) -> float:  # the later it is asked for, the better
        seen.append(choice.tobytes()) if choice.tobytes() not in seen else None
        return 10.0 - seen.index(choice.tobytes())

    measured.truth = true
    second, report = run(Allocate("4bits", rerank=4))
    runs = report.metrics["runs"]
    assert runs["taken"] == len(runs["true"]) - 1 > 0
    assert dict(second.plan.sites) != believed
    assert (bits_per_weight(second) or 99) <= 4
    assert second.plan.solution["gap"] >= first.plan.solution["gap"]


def test_models_too_large_to_run_are_decided_without_terms(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.importance = {"q": 1.0, "k": 1.0, "v": 0.8, "out": 0.8, "wide": 1e-9}
    measured.direction = {"q": np.full(16, 0.325), "k": np.full(16, -0.325)}
    believed, _ = run(Allocate("3.5bits", rerank=1))
    monkeypatch.setattr("qcompiler.passes.plan.decide._MOST_WEIGHTS", 1000)
    done, report = run(Allocate("3.5bits"))
    plain, _ = run(Allocate("3.5bits", loss="ablation"))
    assert report.metrics["runs"] == {}
    assert done.plan.sites == plain.plan.sites != believed.plan.sites


def test_the_plain_answer_is_told_with_its_own_bound(measured: Measured) -> None:
    """Where runs prefer the answer without terms between sites, loss, bound and curve are those without them."""
    measured.direction = {"q": np.full(16, 0.2), "k": np.full(16, -0.2), "out": np.full(16, 0.1)}
    plain, _ = run(Allocate("3.5bits", loss="ablation", rerank=1))
    done, report = run(Allocate("3.5bits"))
    assert report.metrics["measured"]["cross terms"]
    assert report.metrics["runs"]["taken"] == 0
    for name in ("predicted_loss", "lower_bound", "curve"):
        np.testing.assert_allclose(done.plan.solution[name], plain.plan.solution[name], rtol=1e-6)


def test_the_path_of_sizes_is_solved_and_bounded(measured: Measured) -> None:
    wave = np.sin(np.arange(16))
    measured.direction = {"q": 0.2 + 0.1 * wave, "k": -0.2 + 0.05 * wave, "out": 0.1 + 0.1 * wave}
    done, _ = run(Allocate("64bits", pareto=7, rerank=1))
    points = done.plan.solution["pareto"]
    assert [len(point) for point in points] == [5] * 7
    for a, b in itertools.pairwise(points):
        assert a["bits"] <= b["bits"]
        assert a["loss"] >= b["loss"]
    for point in points:
        assert point["bound"] <= point["loss"] * (1 + 1e-9)
        single, _ = run(Allocate(f"{point['bits'] + 1e-9}bits", rerank=1))
        assert point["loss"] == pytest.approx(single.plan.solution["predicted_loss"], rel=0.006)
        assert stored_bytes(single) <= point["bytes"]
    judged, _ = run(Allocate("64bits", pareto=7))  # of the problem that the plan is the answer to
    told = judged.plan.solution
    assert told["pareto"][-1]["loss"] == pytest.approx(told["predicted_loss"], rel=0.006)
    for count in (1, 1001):
        with pytest.raises(BadOption):
            Allocate("4bits", pareto=count)


def test_sensitive_sites_get_more_bits_and_the_fastest_activations(measured: Measured) -> None:
    done, _ = run(Allocate("4.5bits"))
    width = {name: plan.weight.bits for name, plan in done.plan.sites.items() if plan.weight}
    assert width["k"] > width["q"] > width["v"]
    assert {plan.activation for plan in done.plan.sites.values()} == {"dynamic"}


def test_report_lists_every_option_of_every_site(measured: Measured) -> None:
    done, report = run(Allocate("4.5bits", bits=(3, 4, 8)))
    rows = report.metrics["sites"]
    assert [row["site"] for row in rows] == [site.name for site in find_sites(done.ir)]
    for row in rows:
        assert [o["width"] for o in row["options"]] == [3, 4, 8]
        assert row["options"][row["chosen"]]["spec"] == row["spec"] == str(done.plan.sites[row["site"]].weight)
        assert row["bytes"] == row["bits"] // 8
    facts = {"mode": "full", "samples": 16, "probes": 30, "seconds": 1.0, "method": "gram", "cross terms": False}
    assert report.metrics["measured"] == facts
    assert sum(row["loss"] for row in rows) == pytest.approx(done.plan.solution["predicted_loss"])


def test_byte_budget_counts_all_that_is_stored(measured: Measured) -> None:
    least, _ = run(Allocate("2.5bits"))
    size = stored_bytes(least)
    exact, _ = run(Allocate(f"{size}B"))
    assert stored_bytes(exact) == size
    with pytest.raises(BudgetInfeasible, match=f"smallest feasible budget is {size}B"):
        run(Allocate(f"{size - 1}B"))


def test_several_budgets_hold_together(measured: Measured) -> None:
    both, _ = run(Allocate(("6bits", "4bits", "14kB")))
    assert (bits_per_weight(both) or 99) <= 4
    assert stored_bytes(both) <= 14_000
    bits_only, _ = run(Allocate("4bits"))
    assert stored_bytes(bits_only) > 14_000


def test_infeasible_budgets_are_refused_before_measuring_and_name_what_takes_the_room(measured: Measured) -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        run(Allocate("2.49bits"))
    message = str(caught.value)
    assert "2.49bits cannot be met" in message
    assert "smallest feasible budget is 2.5000bits" in message
    assert "wide (5.12 kB), q (1.28 kB), out (1.28 kB)" in message
    assert not measured.calls


def test_kept_sites_stay_float_and_leave_the_average(measured: Measured) -> None:
    done, _ = run(Allocate("3bits", keep=("w*",)))
    assert "wide" not in done.plan.sites
    assert done.plan.kept == ("wide",)
    assert (bits_per_weight(done) or 99) <= 3
    with pytest.raises(BudgetInfeasible, match=r"wide \(kept\) \(65.5 kB\)"):
        run(Allocate("60kB", keep=("wide",)))
    with pytest.raises(BadOption, match="matches no site"):
        run(Allocate("3bits", keep=("nothing",)))


def test_what_the_target_cannot_hold_stays_float_inside_the_average(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_target(monkeypatch, Target(float_sites=("k",)))
    done, report = run(Allocate("6bits"))
    assert "k" not in done.plan.sites
    assert (bits_per_weight(done) or 99) <= 6
    assert [(r.where, "float" in r.reason) for r in report.refused] == [("k", True)]
    with pytest.raises(BudgetInfeasible, match=r"k \(stays float: it has no kernel for this\)"):
        run(Allocate("3bits"))


def test_rows_of_dynamic_activations_get_the_width_that_is_asked_for(measured: Measured) -> None:
    done, _ = run(Allocate("4bits", activations="dynamic", activation_bits=4, activation_clip=0.9))
    assert {(p.activation, p.activation_bits, p.activation_clip) for p in done.plan.sites.values()} == {
        ("dynamic", 4, 0.9)
    }
    done, _ = run(Allocate("4bits", activations="dynamic"))
    assert {p.activation_bits for p in done.plan.sites.values()} == {8}


def test_static_activations_are_refused_where_the_target_has_none(measured: Measured) -> None:
    done, report = run(Allocate("4bits", activations="static"))
    assert {p.activation for p in done.plan.sites.values()} == {"dynamic"}
    assert len(report.refused) == 5
    assert "no static kernels" in report.refused[0].reason
    done, report = run(Allocate("4bits", activations="float"))
    assert {p.activation for p in done.plan.sites.values()} == {"float"}
    assert not report.refused


@pytest.mark.parametrize("ties", ["inputs", "target"])
def test_tied_sites_share_a_decision(measured: Measured, monkeypatch: pytest.MonkeyPatch, ties: str) -> None:
    use_target(monkeypatch, Target(ties="inputs"))
    done, _ = run(Allocate("4.5bits", ties=ties))
    assert done.plan.sites["q"] == done.plan.sites["k"] == done.plan.sites["v"]
    free, _ = run(Allocate("4.5bits", ties="none"))
    assert free.plan.sites["q"] != free.plan.sites["k"]
    assert free.plan.solution["predicted_loss"] < done.plan.solution["predicted_loss"]


@pytest.mark.parametrize("factor", [1e-12, 2e-4])  # all widths need float32 scales, or 8 bits alone
def test_tied_sites_share_the_wider_scales(measured: Measured, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    use_target(monkeypatch, Target(ties="inputs"))
    small = shrunk("k", factor)
    small.plan = Plan()
    report = Allocate("8.8bits").run(small, Silent())
    plans = small.plan.sites
    assert plans["q"] == plans["k"] == plans["v"]
    assert str(plans["q"].weight) == "int8-sym-g32-fp32"
    assert str(plans["out"].weight).endswith("fp16")
    assert not [r for r in report.refused if "not tied" in r.reason]


def test_group_sizes_are_a_choice(measured: Measured) -> None:
    one, _ = run(Allocate("4.2bits"))
    many, _ = run(Allocate("4.2bits", group_sizes=(16, 32, 64, 128)))
    sizes = {str(p.weight.granularity) for p in many.plan.sites.values() if p.weight}
    assert sizes - {"g32"}
    assert many.plan.solution["predicted_loss"] < one.plan.solution["predicted_loss"]
    offered = measured.calls[-1][1][0]
    fours = {str(p.weight.granularity) for p in offered if p.weight and p.weight.bits == 4}
    assert fours == {"g16", "g32", "g64"}  # nothing that was asked for is left out
    sizes = [p.weight.stored_bits(64, 64) for p in offered if p.weight]
    assert max(sizes) == max(size for size, p in zip(sizes, offered, strict=True) if "g32" in str(p.weight))
    # q has 64 columns: groups of 128 would store the same as groups of 64
    assert not any("g128" in str(p.weight) for p in offered)


def test_shortlist_keeps_the_ends_and_drops_what_is_worse_and_bigger() -> None:
    site = find_sites(model().ir)[0]
    plans = [
        SitePlan(QuantSpec(Int(b), g)) for b in (2, 3, 4, 5, 6, 8) for g in (PerGroup(16), PerGroup(32), PerChannel())
    ]
    plans.sort(key=lambda plan: site_bits(site, plan))
    kept = shortlist(site, plans, 6)
    assert len(kept) == 6
    assert kept[0] == plans[0]
    assert kept[-1].weight is not None
    assert kept[-1].weight.bits == 8
    assert shortlist(site, plans, 30) == plans


def test_losses_that_are_not_finite_are_never_chosen(measured: Measured) -> None:
    real = measured.loss
    measured.loss = lambda s, p: np.nan if p.weight.bits == 8 else real(s, p)  # type: ignore[method-assign,union-attr]
    done, report = run(Allocate("40bits"))
    assert {p.weight.bits for p in done.plan.sites.values() if p.weight} == {6}
    assert report.metrics["sites"][0]["options"][-1]["loss"] is None
    measured.override = {"v": np.inf}
    with pytest.raises(PassRefused, match="v: every option"):
        run(Allocate("40bits"))


def test_measuring_gets_its_limits(measured: Measured) -> None:
    run(Allocate("4bits", samples=7, seconds=3.0))
    assert measured.calls[0][2]["samples"] == 7
    assert measured.calls[0][2]["seconds"] == 3.0


@pytest.mark.parametrize(
    "options",
    [
        {"budget": ()},
        {"budget": "4"},
        {"activations": "int8"},
        {"ties": "all"},
        {"bits": ()},
        {"bits": (1, 4)},
        {"group_sizes": (0,)},
        {"method": "guess"},
        {"loss": "guess"},
        {"rerank": 0},
    ],
)
def test_meaningless_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        Allocate(**options)


@pytest.mark.parametrize("method", ["lagrangian", "ilp"])
def test_solvers_by_name(measured: Measured, method: str) -> None:
    done, _ = run(Allocate("4bits", method=method))
    assert done.plan.solution["method"] == method


def test_pipeline_files_take_one_budget_or_several() -> None:
    for text, budget in (('"3.5bits"', ("3.5bits",)), ('["3.5bits", "1MB"]', ("3.5bits", "1MB"))):
        pipeline = Pipeline.from_toml(f'[[pass]]\nname = "allocate"\nbudget = {text}\n')
        assert pipeline.passes[0] == Allocate(budget)
        assert Pipeline.from_toml(pipeline.to_toml()) == pipeline


def test_a_model_without_sites_gets_an_empty_plan(measured: Measured) -> None:
    empty = model()
    done, report = run(Allocate("4bits", keep=("*",)), empty)
    assert (dict(done.plan.sites), report.changed) == ({}, 0)
    assert done.plan.solution["curve"] == []


@dataclass
class Asked(Target):
    """A target that is told which activations are wanted, and has static ones for q only."""

    activations: str = "float"

    def candidates(self, site: Site, bits: Sequence[int]) -> list[SitePlan]:
        static = self.activations == "static" and site.name == "q"
        return [SitePlan(QuantSpec(Int(b), PerChannel()), "static" if static else "float") for b in bits]


def test_a_target_that_has_a_say_in_activations_is_told_and_believed(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        registry, "find", lambda kind, name, find=FIND: Asked if kind == "backends" else find(kind, name)
    )
    done, report = run(Allocate("5bits", activations="static"))
    assert {n: p.activation for n, p in done.plan.sites.items() if p.activation != "float"} == {"q": "static"}
    assert [r.where for r in report.refused] == ["k", "v", "out", "wide"]
    assert all("no static activations" in r.reason for r in report.refused)


def test_menu_names_the_fastest_activation_once_a_format() -> None:
    site = find_sites(model().ir)[0]
    assert [p.activation for p in menu(Target(), site, (8, 4), (), "auto").plans] == ["dynamic", "dynamic"]
    assert [p.weight.bits for p in menu(Target(), site, (8, 4), (), "auto").plans if p.weight] == [4, 8]
