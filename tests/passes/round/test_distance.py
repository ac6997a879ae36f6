"""The differentiable losses are those of `measure.loss`, and their gradients those of autograd."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.measure.loss import output_kind, output_loss

torch = pytest.importorskip("torch")


def outputs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    exact = 4 * rng.standard_normal((150, 40))
    found = exact + 0.3 * rng.standard_normal(exact.shape)
    if kind == "probabilities":
        exact, found = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (exact, found))
    if kind == "values":
        exact, found = exact[:, :5], found[:, :5]
    assert output_kind(exact) == kind
    return exact.astype(np.float32), found.astype(np.float32)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "values"])
def test_it_is_the_loss_that_everything_is_judged_by(kind: str) -> None:
    from qcompiler.passes.round.distance import distance

    exact, found = outputs(kind)
    loss = distance([torch.from_numpy(found), torch.zeros(3)], [exact, np.zeros(3, np.int64)])
    assert float(loss) == pytest.approx(output_loss({"y": exact}, {"y": found}), rel=1e-4)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_gradients_are_those_of_autograd(kind: str) -> None:
    from qcompiler.passes.round.distance import distance

    exact, found = outputs(kind)
    inputs = [torch.from_numpy(found).requires_grad_(requires_grad=True) for _ in range(2)]
    distance([inputs[0]], [exact]).backward()
    z, goal = inputs[1], torch.from_numpy(exact)
    q = torch.log_softmax(z, -1) if kind == "logits" else z.log() - z.sum(-1, keepdim=True).log()
    p = torch.log_softmax(goal, -1) if kind == "logits" else goal.log()
    (p.exp() * (p - q)).sum(-1).mean().backward()
    np.testing.assert_allclose(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-6)
