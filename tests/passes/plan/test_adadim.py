"""AdaDim takes the better axis of every site, at the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from qcompiler.budget import stored_bytes
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import PerGroup, PerRowGroup
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.adadim import AdaDim
from qcompiler.passes.round.nearest import Nearest
from qcompiler.plan import Plan
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, cnn, mlp, planned


def uneven(better: str) -> Model:
    """y = x W, for whose rounding one axis is much better.

    Rows: input channels have weights of very different sizes, and inputs that make up for it: all of them matter.
    Columns: one in eight input channels matters much more than the others, and a group of columns can serve it alone.
    """
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((32, 32)), rng.standard_normal((40, 32))
    sizes = np.exp(2 * rng.standard_normal(32))
    if better == "rows":
        w, x = w * sizes[:, None], x / sizes
    else:
        x[:, ::8] *= 30
    node, feeds = helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"), {"x": x.astype(np.float32)}
    return build([node], {"w": w.astype(np.float32)}, {"x": ["n", 32]}, ["y"], feeds)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("start", ["g8", "r8"])
@pytest.mark.parametrize(("better", "wanted"), [("rows", PerRowGroup(8)), ("columns", PerGroup(8))])
def test_the_better_axis_is_taken(rounding: str, start: str, better: str, wanted: PerGroup | PerRowGroup) -> None:
    model = planned(uneven(better), f"uint3-asym-{start}")
    before = stored_bytes(model)
    report = AdaDim(rounding=rounding).run(model, Silent())  # type: ignore[arg-type]
    (plan,) = model.plan.sites.values()
    assert plan.weight is not None
    assert plan.weight.granularity == wanted
    assert stored_bytes(model) == before
    assert report.changed == (str(wanted) != start)
    (errors,) = report.metrics["relative_error"].values()
    assert errors[better] < 0.5 * max(errors.values())


def test_metrics_are_the_errors_of_rounding() -> None:
    model = planned(uneven("rows"), "uint3-asym-g8")
    report = AdaDim(rounding="nearest", clipping="minmax", samples=40).run(model, Silent())
    (site,) = find_sites(model.ir)
    assert model.calibration is not None
    x = next(iter(model.calibration.batches(40)))["x"]
    for name, form in (("columns", "g8"), ("rows", "r8")):
        trial = planned(model.clone(), f"uint3-asym-{form}")
        Nearest("minmax").run(trial, Silent())
        change = trial.weights[site.name].decode() - site.matrix()
        expected = np.square(x @ change.T).sum() / np.square(x @ site.matrix().T).sum()
        assert report.metrics["relative_error"][site.name][name] == pytest.approx(expected, rel=1e-3)


def test_bytes_never_grow_and_what_cannot_be_turned_says_so() -> None:
    model = planned(mlp(), "uint4-asym-g24")  # [48, 24] and [16, 48]: 24 divides no 16 rows
    before = stored_bytes(model)
    report = AdaDim().run(model, Silent())
    assert stored_bytes(model) <= before
    assert any("take" in r.reason for r in report.refused)
    model = planned(mlp(), "uint4-asym-g8")
    report = AdaDim(target="cpu").run(model, Silent())
    assert report.changed == 0
    assert all("before they are scaled" in r.reason for r in report.refused)
    assert len(report.refused) == 2
    assert all(p.weight and p.weight.granularity == PerGroup(8) for p in model.plan.sites.values())


@pytest.mark.parametrize("spec", ["int4-sym-channel-fp32", "int2to4p25-asym-g8", "int8-sym-tensor"])
def test_what_has_no_such_groups_stays(spec: str) -> None:
    model = planned(mlp(), spec)
    plan = model.plan
    assert AdaDim().run(model, Silent()).changed == 0
    assert model.plan == plan


def test_convolutions_and_their_files() -> None:
    model = planned(cnn(), "uint3-asym-g4-fp16")
    AdaDim().run(model, Silent())
    Nearest().run(model, Silent())
    InsertQDQ().run(model, Silent())
    assert model.lowered


def test_refusals() -> None:
    with pytest.raises(BadOption, match="samples"):
        AdaDim(samples=0)
    with pytest.raises(BadOption, match="damping"):
        AdaDim(damping=-1.0)
    model = planned(mlp(), "uint4-asym-g8")
    model.calibration = None
    with pytest.raises(PassRefused, match="calibration"):
        AdaDim().requires(model)
    model.plan = Plan()
    with pytest.raises(PassRefused, match="nothing is planned"):
        AdaDim().requires(model)
