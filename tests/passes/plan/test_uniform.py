"""Uniform with a made-up target."""

from __future__ import annotations

from typing import Any

import pytest

from qcompiler.budget import bits_per_weight
from qcompiler.errors import BadOption
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.progress import Silent
from tests.passes.plan.made_up import Target, run, shrunk, use_target
from tests.passes.round.small_models import mlp


def test_uniform_takes_wider_scales_where_it_must_and_says_so() -> None:
    small = shrunk("k", 1e-12)
    report = Uniform("int8-sym-channel-fp16").run(small, Silent())
    wide = [name for name, plan in small.plan.sites.items() if plan.weight and plan.weight.scale_dtype == "float32"]
    assert wide == ["k"]
    assert [r.where for r in report.refused if "float32 scales" in r.reason] == ["k"]


def test_uniform_gives_everyone_the_same_and_says_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    use_target(monkeypatch, Target(float_sites=("out",)))
    done, report = run(Uniform("int4-sym-g32-fp16", activation="static", keep=("v",)))
    assert {str(p.weight) for p in done.plan.sites.values()} == {"int4-sym-g32-fp16"}
    assert sorted(done.plan.sites) == ["k", "q", "wide"]
    assert {p.activation for p in done.plan.sites.values()} == {"float"}
    reasons = {r.reason for r in report.refused if r.where == "out"}
    assert reasons == {"activations stay float: it has no kernel for this", "stays float: it has no kernel for this"}
    assert report.changed == 3
    assert report.metrics["bits_per_weight"] == bits_per_weight(done)


@pytest.mark.parametrize("options", [{"spec": "float9"}, {"activation": "int8"}, {"embeddings": "nf4"}])
def test_uniform_refuses_meaningless_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        Uniform(**options)


@pytest.mark.parametrize(("target", "options", "named"), [
    ("onnx", {"spec": "int9-sym-channel-fp32"}, "int9-sym-channel-fp32"),
    ("cpu", {"spec": "int4to8p10"}, "int4to8p10"),
])  # fmt: skip
def test_a_format_that_the_target_stores_nothing_in_is_refused_before_any_work(
    target: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadOption, match=f"pass 'uniform': target {target} .*'{named}.*; give a spec such as int8") as e:
        Uniform(target=target, **options).foresee(mlp())
    assert "\n" not in str(e.value)
    with pytest.raises(BadOption, match=named):
        Uniform(target=target, **options).run(mlp(), Silent())


def test_a_format_that_nothing_asks_for_is_not_looked_at() -> None:
    """All weights are kept."""
    model = mlp()
    Uniform(spec="int9-sym-channel-fp32", keep=("*",)).run(model, Silent())
    assert not model.plan.sites
