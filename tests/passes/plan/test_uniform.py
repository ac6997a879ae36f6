"""Uniform with a made-up target."""

from __future__ import annotations

from typing import Any

import pytest

from qcompiler.budget import bits_per_weight
from qcompiler.errors import BadOption
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.progress import Silent
from tests.passes.plan.made_up import Target, run, shrunk, use_target


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
