"""The teacher's outputs are the float model's, whether they are kept or made again."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.passes.round.teacher import Teacher
from tests.passes.round.small_models import cnn, mlp


def wide() -> Model:
    """Outputs far larger than what goes into the last layer."""
    model = mlp()
    value = model.graph.initializers["fc2.weight"]
    import onnx_ir as ir

    big = np.random.default_rng(3).standard_normal((48, 4000)).astype(np.float32)
    value.const_value = ir.tensor(big, name="fc2.weight")
    value.shape = ir.Shape(big.shape)
    model.graph.outputs[0].shape = None
    return model


@pytest.mark.parametrize(
    ("model", "again"), [(mlp(), False), (cnn(), False), (wide(), True)], ids=["mlp", "cnn", "wide"]
)
def test_outputs(model: Model, again: bool) -> None:
    feeds = calibration_feeds(model, 5, 0)
    teacher, run = Teacher(model, feeds), Runner(model.ir)
    assert len(teacher) == 5
    assert teacher._again == again
    for index in (3, 0, 3):
        np.testing.assert_allclose(teacher[index][0], run(feeds[index])["y"], rtol=1e-5, atol=1e-5)
