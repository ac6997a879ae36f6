from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from qcompiler.errors import BadData
from qcompiler.evaluate.classes import class_output, kinds_of_outputs
from qcompiler.evaluate.fidelity import FidelityMeter, fidelity
from qcompiler.evaluate.perplexity import perplexity

RNG = np.random.default_rng(4)


def log_softmax(z: np.ndarray) -> np.ndarray:
    wide = z.astype(np.float64) - z.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_fidelity_of_logits_equals_the_formulas() -> None:
    z = RNG.standard_normal((40, 30)).astype(np.float32) * 4
    y = (z + RNG.standard_normal(z.shape)).astype(np.float32)
    found = fidelity({"logits": z}, {"logits": y})
    p, q = log_softmax(z), log_softmax(y)
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean())
    assert found["top1_agreement"] == pytest.approx((z.argmax(-1) == y.argmax(-1)).mean())
    noise = ((y.astype(np.float64) - z) ** 2).sum()
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((z.astype(np.float64) ** 2).sum() / noise))


def test_batches_add_up() -> None:
    z = RNG.standard_normal((40, 30)).astype(np.float32) * 4
    y = (z + RNG.standard_normal(z.shape)).astype(np.float32)
    meter = FidelityMeter()
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
        meter.add({"logits": z[part]}, {"logits": y[part]})
    whole = fidelity({"logits": z}, {"logits": y})
    assert meter.result() == {name: pytest.approx(value) for name, value in whole.items()}


def test_values_have_no_classes() -> None:
    z = RNG.standard_normal((6, 4)).astype(np.float32)
    found = fidelity({"boxes": z, "count": np.arange(6)}, {"boxes": z * 1.1, "count": np.arange(6)})
    assert found["kl"] is None
    assert found["top1_agreement"] is None
    assert found["sqnr_db"] == pytest.approx(20, abs=0.01)
    with pytest.raises(ValueError, match="shape"):
        fidelity({"boxes": z}, {"boxes": z[:3]})


def test_equal_outputs_are_perfect() -> None:
    p = np.full((5, 4), 0.25, np.float32)
    found = fidelity({"p": p}, {"p": p})
    assert found["kl"] == 0
    assert found["top1_agreement"] == 1
    assert found["sqnr_db"] is not None
    assert found["sqnr_db"] > 200


def test_perplexity_of_known_models() -> None:
    tokens = RNG.integers(0, 50, (5, 12))

    def uniform(feeds):
        return {"logits": np.zeros((*feeds["input_ids"].shape, 50), np.float32)}

    found = perplexity(uniform, tokens, batch=2)
    assert found["ppl"] == pytest.approx(50, rel=1e-5)
    assert found["tokens"] == 5 * 11
    table = RNG.standard_normal((50, 50)).astype(np.float32) * 3

    def bigram(feeds):
        return {"out": table[feeds["ids"]]}

    expected = -np.mean([log_softmax(table)[a, b] for row in tokens for a, b in pairwise(row)])
    assert perplexity(bigram, tokens, input_name="ids", output_name="out")["nll"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_refuses_what_it_cannot_judge() -> None:
    def run(feeds):
        return {"logits": np.zeros((*feeds["input_ids"].shape, 5), np.float32)}

    with pytest.raises(BadData, match="nothing to predict"):
        perplexity(run, np.zeros((3, 1), np.int64))
    with pytest.raises(BadData, match="outside"):
        perplexity(run, np.full((1, 4), 5))


def test_an_output_that_is_copied_does_not_flatter_the_others() -> None:
    reference = {"x": np.ones((4, 3), np.float32), "y": np.ones((4, 3), np.float32)}
    outputs = {"x": reference["x"], "y": reference["y"] * np.float32(1.1)}
    assert fidelity(reference, outputs)["sqnr_db"] == pytest.approx(20, abs=0.1)
    same = fidelity(reference, reference)["sqnr_db"]
    assert same is not None
    assert same > 200


PEAKED = np.eye(12, dtype=np.float32)[RNG.integers(0, 12, 8)] * 9
FLAT = RNG.standard_normal((8, 12)).astype(np.float32) / 10


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_a_state_is_no_class_scores_whatever_its_numbers(samples: int) -> None:
    feeds = {"x": FLAT[:samples, :5], "state": FLAT[:samples]}
    kinds = kinds_of_outputs(feeds, {"next": PEAKED[:samples], "speech": FLAT[:samples, :1]})
    assert kinds == {"next": "values", "speech": "values"}
    assert class_output(kinds) is None


def test_the_first_output_with_class_scores_is_judged_and_no_other() -> None:
    outputs = {"n": np.arange(8), "flat": FLAT, "scores": PEAKED, "more": PEAKED[:, ::-1].copy()}
    kinds = kinds_of_outputs({"x": FLAT[:, :5]}, outputs)
    assert kinds == {"flat": "values", "scores": "logits", "more": "values"}
    assert class_output(kinds) == "scores"
    meter = FidelityMeter({"flat": "values", "scores": "logits", "more": "logits"})
    wrong = {**outputs, "more": -outputs["more"]}
    meter.add(outputs, wrong)
    assert meter.class_output == "scores"
    assert meter.result()["kl"] == 0
    assert meter.result()["top1_agreement"] == 1


def test_a_classifier_with_as_many_classes_as_features_is_one() -> None:
    assert kinds_of_outputs({"x": FLAT}, {"y": PEAKED}) == {"y": "logits"}
