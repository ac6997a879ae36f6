from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from qcompiler.model import Model
from qcompiler.passes.round.histograms import static_range
from qcompiler.passes.transform.channel_noise import channel_noise
from qcompiler.passes.transform.equalize_activations import EqualizeActivations
from qcompiler.pipeline import Pipeline
from tests.passes.round.small_models import build

CHANNELS = 8


def two_layers(data: np.ndarray, seed: int = 0) -> Model:
    """x -> Conv 1x1, the identity -> Relu -> Conv 1x1: what is behind the Relu is what is given."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": np.eye(CHANNELS, dtype=np.float32)[:, :, None, None],
        "w2": rng.standard_normal((16, CHANNELS, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="second"),
    ]
    return build(nodes, weights, {"x": ["batch", CHANNELS, *data.shape[2:]]}, ["y"], {"x": data})


def images(rare: int, samples: int = 32) -> np.ndarray:
    """Positive; all channels but two are weak, and `rare` of these are strong in the second half only."""
    rng = np.random.default_rng(1)
    x = rng.exponential(size=(samples, CHANNELS, 6, 6)).astype(np.float32)
    x[:, 2:] /= 50
    x[samples // 2 :, 2 : 2 + rare] *= 100
    return x


@pytest.mark.parametrize("unsigned", [True, False])
def test_errors_from_counts_are_those_of_the_grid(unsigned: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_t(4, size=(8, CHANNELS, 20, 20)).astype(np.float32) * np.geomspace(0.1, 3, CHANNELS)[:, None, None]
    x = np.abs(x) if unsigned else x
    found = channel_noise(two_layers(x), {"x": 1})["x"]
    s, weight = np.geomspace(0.2, 1, CHANNELS), rng.uniform(0.5, 2, CHANNELS)
    for half, part in enumerate((x[:4], x[4:])):
        np.testing.assert_allclose(found.reach[half], np.abs(part).max((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(found.power(half), np.square(part).sum((0, 2, 3)), rtol=0.02)
        scaled = part / s[:, None, None]
        errors: list[float] = []
        for share in (1.0, 0.7, 0.5, 0.35):
            top = float(np.abs(scaled).max()) * share
            grid = static_range(0.0 if unsigned else -top, top)
            y = (np.clip(np.rint(scaled / grid.scale) + grid.zero, 0, 255) - grid.zero) * grid.scale
            errors.append(float(np.square((y - scaled) * s[:, None, None]).sum((0, 2, 3)) @ weight))
        assert found.error(half, s, weight) == pytest.approx(min(errors), rel=0.1)


def test_channels_that_half_of_the_data_is_silent_about_are_stretched_less() -> None:
    """The control: channels that are as weak in all of the data are stretched to fill the range."""
    chosen: dict[int, float] = {}
    for rare in (0, 5):
        report = Pipeline([EqualizeActivations(activations="static")]).run(two_layers(images(rare)))[0]
        strength, _ = report.metrics["strength_and_margin"]["r"]
        chosen[rare] = strength
    assert chosen[0] >= 0.5
    assert chosen[5] <= chosen[0] / 2


def test_what_is_given_is_not_chosen() -> None:
    report = Pipeline([EqualizeActivations(0.5, 1.5, activations="static")]).run(two_layers(images(0)))[0]
    assert set(report.metrics["strength_and_margin"].values()) == {(0.5, 1.5)}


def test_one_sample_cannot_be_judged_and_changes_nothing() -> None:
    model = two_layers(images(0, samples=1))
    report = Pipeline([EqualizeActivations(activations="static")]).run(model)[0]
    assert {strength for strength, _ in report.metrics["strength_and_margin"].values()} == {0.0}
