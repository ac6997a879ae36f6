from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import Refusal
from qcompiler.graph.branches import DOWN, DOWN_STEPS, UP, add_branch
from qcompiler.graph.codes import DOMAIN
from qcompiler.graph.folds import find_fold, find_stream
from qcompiler.graph.sites import Site, find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.graph.uncounted import uncounted_weights
from qcompiler.measure.runner import Runner
from qcompiler.measure.segments import Segments
from tests.graph.architectures import ARCHITECTURES, feeds_for

RANK = 2


def branched(name: str, narrow: bool = False) -> tuple[ir.Model, list[list[Site]]]:
    """An architecture with a branch at each product, random, in float16 or int8; and the groups that share one."""
    model = ARCHITECTURES[name]()
    groups: dict[object, list[Site]] = {}
    for site in find_sites(model):
        if site.op in ("MatMul", "Gemm") and len(site.users) == 1 and len(site.shape) == 2:
            groups.setdefault(site.activation, []).append(site)
    rng = np.random.default_rng(0)
    dtype, size = (np.int8, 40.0) if narrow else (np.float16, 1.0)
    for sites in groups.values():
        lefts = [rng.normal(0, size, (site.rows, RANK)).astype(dtype) for site in sites]
        steps = rng.uniform(1e-5, 1e-4, RANK).astype(np.float32) if narrow else None
        add_branch(model, sites, lefts, rng.normal(0, size, (RANK, sites[0].columns)).astype(dtype), steps)
    return model, list(groups.values())


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "vit"])
def test_a_branch_is_two_calls_of_functions_and_readers_share_the_first(name: str, narrow: bool) -> None:
    model, groups = branched(name, narrow)
    first = DOWN_STEPS if narrow else DOWN
    calls = [(node.op_type, node) for node in model.graph if node.domain == DOMAIN]
    assert len([node for kind, node in calls if kind == first]) == len(groups)
    assert len([node for kind, node in calls if kind == UP]) == sum(map(len, groups))
    assert len(groups) < sum(map(len, groups)) or name == "gpt2"
    assert {key[:2] for key in model.functions} == {(DOMAIN, first), (DOMAIN, UP)}
    wanted, found = (Runner(m)(feeds_for(m, loud=True)) for m in (ARCHITECTURES[name](), model))
    for key, array in wanted.items():
        assert np.abs(found[key] - array).max() <= 1e-5 * np.abs(array).max()


@pytest.mark.parametrize("narrow", [False, True])
def test_what_reads_graphs_understands_branches(narrow: bool) -> None:
    """Files, the cut into segments, the list of what no budget counts."""
    model, _ = branched("llama-gqa", narrow)
    feeds = feeds_for(model)
    wanted = Runner(model)(feeds)
    again = ir.from_proto(ir.to_proto(model))
    assert all(np.array_equal(Runner(again)(feeds)[key], array) for key, array in wanted.items())
    assert [site.branch_bits for site in find_sites(again)] == [site.branch_bits for site in find_sites(model)]
    chain = Segments(model, find_sites(model))
    boundary = chain.start(feeds)
    for segment in chain:
        boundary = segment.run(boundary)
    for key, array in wanted.items():
        assert np.abs(boundary[key] - array).max() <= 1e-5 * np.abs(array).max()
    assert uncounted_weights(model) == uncounted_weights(ARCHITECTURES["llama-gqa"]())


@pytest.mark.parametrize("narrow", [False, True])
def test_the_twin_inlines_branches(narrow: bool) -> None:
    torch = pytest.importorskip("torch")
    from qcompiler.measure.fx_twin import fx_twin

    model, _ = branched("llama", narrow)
    feeds = feeds_for(model)
    with torch.no_grad():
        found = fx_twin(model)(*(torch.from_numpy(feeds[str(v.name)]) for v in model.graph.inputs))
    for value, tensor in zip(model.graph.outputs, found, strict=True):
        array = Runner(model)(feeds)[str(value.name)]
        assert np.abs(tensor.numpy() - array).max() <= 1e-4 * np.abs(array).max()


def test_nothing_crosses_a_branch_and_the_reason_says_so() -> None:
    """Its numbers are float16: a transform would round them again."""
    model, groups = branched("llama-gqa")
    stream = find_stream(model, residual_streams(model)[0].values[0])
    assert isinstance(stream, Refusal)
    assert "low-rank branch, which would be rounded again" in stream.reason
    for sites in groups:
        assert sites[0].activation is not None
        fold = find_fold(model, sites[0].activation)
        assert isinstance(fold, Refusal)
        assert "low-rank branch, which would be rounded again" in fold.reason
