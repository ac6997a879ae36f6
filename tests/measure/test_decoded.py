"""A decoded weight is the matrix of its codes in the tensor's layout and type, wherever it is written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure import decoded
from qcompiler.measure.decoded import decoded_weight
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.streams import Streams, calibration_feeds
from qcompiler.progress import Silent
from qcompiler.scratch import is_spilled
from tests.graph.test_functions import KINDS, one_site
from tests.passes.round.small_models import mlp


@pytest.mark.parametrize("least", [0, 1 << 26])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_matrix_in_the_layout_of_the_tensor(kind: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_LARGE", least)
    (site,) = find_sites(one_site(kind).ir)
    codes = quantize(site.matrix(), parse_spec("int4-sym-g16-fp16"))
    tensor = site.weight.const_value
    assert tensor is not None
    found = decoded_weight(site, codes)
    assert (found.dtype, found.shape) == (tensor.dtype.numpy(), site.shape)
    np.testing.assert_array_equal(found, site.from_matrix(codes.decode()))
    assert is_spilled(found) == (least == 0)


def test_a_half_precision_weight_stays_one() -> None:
    model = mlp()
    site = find_sites(model.ir)[0]
    tensor = site.weight.const_value
    assert tensor is not None
    site.weight.const_value = ir.tensor(tensor.numpy().astype(np.float16), name=site.weight.name)
    found = decoded_weight(site, quantize(site.matrix(), parse_spec("int4-sym-g16-fp16")))
    assert found.dtype == np.float16


def test_the_last_product_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    Uniform(spec="int4-sym-g8-fp16").run(model, Silent())
    streams = Streams(model, calibration_feeds(model, 4, 64))
    sites = streams.segments.sites
    assert [streams.is_read_behind(site) for site in sites] == [True] * (len(sites) - 1) + [False]
    replaced: list[str] = []
    real = Streams.replace
    monkeypatch.setattr(Streams, "replace", lambda self, site, t: (replaced.append(site.name), real(self, site, t)))
    GPTQ().run(model, Silent())
    assert replaced == [site.name for site in sites[:-1]]
    assert set(model.weights) == {site.name for site in sites}


def test_what_a_subgraph_reads_counts_as_read() -> None:
    model: Model = mlp()
    last = find_sites(model.ir)[-1]
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = ir.node("Identity", [last.node.outputs[0]])
        branches[name] = ir.Graph([], node.outputs, nodes=[node], name=name)
    condition = ir.val("condition", const_value=ir.tensor(np.array(True), name="condition"))
    model.graph.register_initializer(condition)
    model.graph.append(ir.node("If", [condition], branches))
    assert Streams(model, calibration_feeds(model, 4, 64)).is_read_behind(last)
