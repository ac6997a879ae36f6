"""What a pipeline must have so that something is quantized, and what is said where nothing is."""

from __future__ import annotations

import pytest

from qcompiler.build.lowering import lower
from qcompiler.errors import BadOption
from qcompiler.pipeline import Pipeline
from qcompiler.progress import Silent
from tests.passes.round.small_models import mlp, planned

ROUNDED = '[[pass]]\nname = "nearest"\n'
LOWERED = '[[pass]]\nname = "insert-qdq"\n'


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.seen = list[str]()

    def note(self, text: str) -> None:
        self.seen.append(text)


@pytest.mark.parametrize("name", ["nearest", "gptq", "choose-rounding"])
def test_rounding_without_a_plan_is_refused(name: str) -> None:
    with pytest.raises(BadOption, match=rf"'{name}' rounds what is planned.*; put 'allocate' or 'uniform' in front"):
        lower(mlp(), Pipeline.from_toml(f'[[pass]]\nname = "{name}"\n' + LOWERED), Silent())


@pytest.mark.parametrize("plan", ['[[pass]]\nname = "uniform"\n', ""])
def test_a_plan_may_come_from_a_pass_or_with_the_model(plan: str) -> None:
    model, notes = mlp() if plan else planned(mlp(), "int8-sym-channel-fp32"), Notes()
    assert len(lower(model, Pipeline.from_toml(plan + ROUNDED + LOWERED), notes).rounded.weights) == 2
    assert not [text for text in notes.seen if text.startswith("nothing is quantized")]


@pytest.mark.parametrize("passes", ['[[pass]]\nname = "equalize"\n', '[[pass]]\nname = "uniform"\nkeep = ["*"]\n'])
def test_a_model_that_stays_float_is_called_so(passes: str) -> None:
    notes = Notes()
    assert not lower(mlp(), Pipeline.from_toml(passes + LOWERED), notes).rounded.weights
    assert notes.seen[-1] == "nothing is quantized: all weights and activations stay float"
