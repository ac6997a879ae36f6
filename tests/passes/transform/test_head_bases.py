"""ResQ's bases for values: what a head hands on strongest comes first, and what reads it is cut there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.panels import Cut, find_cuts, is_high
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.transform.pca_split import PCASplit
from tests.graph.architectures import HEADS, LAYERS, WIDTH
from tests.passes.transform.loud import loud_model, run

SIZE = WIDTH // HEADS


def head_cuts(model: Model, width: int) -> list[Cut]:
    """The cuts at so many columns of the first panel."""
    cuts = [cut for cut in find_cuts(model.graph, find_sites(model.ir)) if cut.sizes[0] == width]
    assert all(is_high(cut.sum.sites[0]) and not is_high(cut.sum.sites[1]) for cut in cuts)
    return cuts


def moments(model: Model, value: ir.Value) -> np.ndarray:
    """Second moments of what comes behind the value that is cut, over the calibration data: [WIDTH, WIDTH]."""
    assert model.calibration is not None
    name = str(value.name)
    rows = [Runner(model.ir, outputs=[name])(feed)[name].reshape(-1, WIDTH) for feed in model.calibration.batches(16)]
    x = np.concatenate(rows).astype(np.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "llama-fused", "qwen", "gemma", "gpt2", "vit", "bert"])
def test_each_attention_is_split_head_by_head(name: str) -> None:
    model = loud_model(name, 16)
    report = run(model, PCASplit(share=0.5, heads=True))
    facts = report.metrics["heads"]
    assert len(facts) == LAYERS
    for found in facts.values():
        assert (found["width"], found["heads"], found["high"], found["cut"]) == (WIDTH, HEADS, WIDTH // 2, 1)
        assert 0.5 < found["power"] <= 1


@pytest.mark.parametrize("name", ["llama", "llama-gqa"])
def test_no_other_basis_of_heads_has_more_power_in_its_first_channels(name: str) -> None:
    """What is reported is there, and of random bases within heads (one for all that share values) none has more."""
    plain, model = loud_model(name, 16), loud_model(name, 16)
    facts = run(model, PCASplit(share=0.25, heads=True)).metrics["heads"]
    values = {str(v.name): v for node in plain.graph for v in node.outputs}
    shown = {str(v.name): v for node in model.graph for v in node.outputs}
    shared = HEADS // (2 if name == "llama-gqa" else HEADS)  # query heads of a head of values
    rng = np.random.default_rng(0)
    for value, found in facts.items():
        now = np.diagonal(moments(model, shown[value])).reshape(HEADS, SIZE)
        assert now[:, 0].sum() / now.sum() == pytest.approx(found["power"], rel=1e-3)
        before = moments(plain, values[value])
        heads = np.stack([before[k : k + SIZE, k : k + SIZE] for k in range(0, WIDTH, SIZE)])
        groups = heads.reshape(-1, shared, SIZE, SIZE).sum(1)
        assert np.trace(heads.sum(0)) == pytest.approx(now.sum(), rel=1e-3)
        best = 0.0
        for _ in range(300):
            first = rng.standard_normal((len(groups), SIZE))
            first /= np.linalg.norm(first, axis=1, keepdims=True)
            best = max(best, float(np.einsum("gi,gij,gj->", first, groups, first)) / float(now.sum()))
        assert best < found["power"] + 1e-9


def test_the_readers_columns_are_sorted_and_counted_as_high() -> None:
    model = loud_model("llama-gqa", 16)
    run(model, PCASplit(share=0.25, heads=True))
    cuts = [cut for cut in head_cuts(model, HEADS) if cut.value.producer() is not None]
    gathers = [cut for cut in cuts if (node := cut.value.producer()) is not None and node.op_type == "Gather"]
    assert len(gathers) == LAYERS
    for cut in gathers:
        node = cut.value.producer()
        assert node is not None
        assert node.inputs[1] is not None
        index = node.inputs[1].const_value
        assert index is not None
        assert index.numpy()[:HEADS].tolist() == list(range(0, WIDTH, SIZE))


def test_what_cannot_be_cut_stays_and_says_why() -> None:
    model = loud_model("llama", 16)
    none = run(model, PCASplit(share=0.1, heads=True))
    assert "heads" not in none.metrics
    assert sum("of 4 channels is none or all" in refusal.reason for refusal in none.refused) == LAYERS
    merged = loud_model("merged", 16)  # values and queries of one product: no weight of their own
    assert "heads" not in run(merged, PCASplit(share=0.25, heads=True)).metrics


def test_without_the_option_heads_stay() -> None:
    model = loud_model("llama", 16)
    assert "heads" not in run(model, PCASplit(share=0.25)).metrics
