from __future__ import annotations

import numpy as np
import pytest

from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.transform.smooth_attention import SmoothAttention
from tests.graph.architectures import ARCHITECTURES, LAYERS
from tests.passes.transform.loud import loud_model, run


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_keys_are_smoothed_and_the_function_is_kept(name: str) -> None:
    model = loud_model(name)
    report = run(model, SmoothAttention())
    # One matrix makes queries and keys: it cannot absorb a scale and its inverse.
    if name in ("gpt2", "gpt2-tied", "packed"):
        assert (report.changed, len(report.refused)) == (0, LAYERS)
    elif any(node.op_type in ("Softmax", "Attention") for node in model.graph):
        assert (report.changed, len(report.refused)) == (LAYERS, 0)
    else:
        assert (report.changed, len(report.refused)) == (0, 0)


def test_the_largest_keys_are_the_square_roots_and_pairs_share_a_scale() -> None:
    model = loud_model("llama-gqa")
    key = next(site for site in find_sites(model.ir) if site.name == "0.k")
    name = key.node.outputs[0].name or ""
    before = channel_statistics(model, [name])[name].absmax
    run(model, SmoothAttention())
    after = channel_statistics(model, [name])[name].absmax
    s = (before / after).reshape(2, 2, -1)  # heads, halves, pairs
    assert np.allclose(s[:, 0], s[:, 1], rtol=1e-4)
    tied = before.reshape(2, 2, -1).max(1)
    assert np.allclose(s[:, 0], np.sqrt(tied), rtol=1e-4)
    assert not np.allclose(s[0], s[1], rtol=0.05)  # heads have their own


def test_strength_zero_changes_nothing() -> None:
    model = loud_model("opt")
    before = [site.matrix() for site in find_sites(model.ir)]
    run(model, SmoothAttention(strength=0.0))
    assert all(np.array_equal(a, s.matrix()) for a, s in zip(before, find_sites(model.ir), strict=True))


def test_options_and_models_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BadOption, match="between 0 and 1"):
        run(loud_model("opt"), SmoothAttention(strength=1.5))
    with pytest.raises(PassRefused, match="calibration data"):
        run(Model(ARCHITECTURES["opt"]()), SmoothAttention())
