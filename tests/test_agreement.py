"""An artifact with one wrong layer is refused, also where a fixed tolerance of a quarter would let it pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.artifact.agreement import FACTOR, Agreement
from qcompiler.artifact.spread import Reference
from qcompiler.artifact.verify import compare
from qcompiler.backends.onnx.backend import OnnxBackend
from qcompiler.calibration import Calibration
from qcompiler.errors import VerificationFailed
from qcompiler.graph.functions import PackedWeight, read_weight
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.nearest import Nearest
from qcompiler.plan import ActivationMode, Plan
from qcompiler.progress import Silent
from qcompiler.target import Feeds, Outputs, Tolerance
from tests.graph.architectures import Net, feeds_for, gpt2, mobilenet
from tests.passes.round.small_models import planned

Mutation = Callable[[ir.Model, int], None]


def lowered(graph: ir.Model, activation: ActivationMode) -> tuple[Model, Feeds]:
    """All weights in 8 bits, embeddings float."""
    data = feeds_for(graph, batch=8)
    model = planned(Model(graph, "net", Calibration.from_arrays(data, graph)), "int8-sym-channel-fp32", activation)
    model.plan = Plan({site.name: model.plan.sites[site.name] for site in find_sites(graph) if site.op != "Gather"})
    passes = [Nearest(), *([ActivationRanges("minmax")] if activation == "static" else []), InsertQDQ()]
    for item in passes:
        item.run(model, Silent())
    return model, data


def transformer() -> tuple[Model, Feeds]:
    """Attention and MLP blocks, products of int8 rows."""
    return lowered(gpt2(), "dynamic")


def convolutions() -> tuple[Model, Feeds]:
    """Convolutions, depthwise ones too, with static uint8 activations."""
    return lowered(mobilenet(), "static")


def outputs_of(model: Model, feeds: Feeds, folder: Path) -> tuple[Outputs, Tolerance]:
    folder.mkdir()
    compiled = OnnxBackend(threads=1).compile(model, folder, Silent())
    return OnnxBackend(threads=1).load(folder).run(feeds), compiled.tolerance


def conclude(model: Model, tolerance: Tolerance, feeds: Feeds, outputs: Outputs) -> dict[str, Any]:
    agreement = Agreement("test", Reference(model.ir, tolerance.noise), tolerance, 8)
    agreement.add(feeds, outputs, None, 8)
    return agreement.conclude()


def weights_of(model: ir.Model) -> list[PackedWeight]:
    found = (read_weight(node.outputs[0]) for node in model.graph)
    return [weight for weight in found if weight is not None]


def change(value: ir.Value | None, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.tensor(edit(tensor.numpy().copy()), dtype=tensor.dtype, name=value.name)


def wrong_scale(model: ir.Model, layer: int) -> None:
    """The scale of one layer's weight, a tenth too large."""
    change(weights_of(model)[layer].dequantize.inputs[1], lambda scale: scale * np.float32(1.1))


def swapped_channels(model: ir.Model, layer: int) -> None:
    """The first two output channels of one layer, exchanged."""
    weight = weights_of(model)[layer]
    axis = 1 if weight.layout == "columns-first" else 0
    order = np.arange(weight.rows)
    order[:2] = 1, 0
    change(weight.dequantize.inputs[0], lambda codes: np.take(codes, order, axis))


def wrong_zero(model: ir.Model, layer: int) -> None:
    """The zero point of the input of one layer, off by one where it is read."""
    node = next(n for n in model.graph if weights_of(model)[layer].output in n.inputs).inputs[0].producer()  # type: ignore[union-attr]
    assert node is not None
    zero = node.inputs[2]
    assert zero is not None
    assert zero.const_value is not None
    moved = ir.val("moved", const_value=ir.tensor((zero.const_value.numpy() + 1).astype(np.uint8), name="moved"))
    model.graph.register_initializer(moved)
    node.replace_input_with(2, moved)


@pytest.mark.parametrize("make", [convolutions, transformer])
def test_a_right_artifact_agrees(make: Callable[[], tuple[Model, Feeds]], tmp_path: Path) -> None:
    model, feeds = make()
    outputs, tolerance = outputs_of(model, feeds, tmp_path / "a")
    entry = conclude(model, tolerance, feeds, outputs)
    assert entry["relative"] <= entry["allowed"] < 0.03
    assert entry["allowed"] == pytest.approx(FACTOR * entry["spread"])


@pytest.mark.parametrize("mutate", [wrong_scale, swapped_channels, wrong_zero])
def test_an_artifact_with_a_wrong_layer_is_refused(mutate: Mutation, tmp_path: Path) -> None:
    model, feeds = convolutions()
    wrong = Model(model.ir.clone(), "wrong", lowered=True)
    mutate(wrong.ir, 2)
    outputs, tolerance = outputs_of(wrong, feeds, tmp_path / "a")
    assert compare(outputs, Runner(model.ir)(feeds)).relative < 0.1
    with pytest.raises(VerificationFailed, match="differs from its QDQ reference"):
        conclude(model, tolerance, feeds, outputs)


@pytest.mark.parametrize("mutate", [wrong_scale, swapped_channels])
@pytest.mark.parametrize("make", [convolutions, transformer])
def test_it_is_refused_whichever_layer_it_is(make: Callable[[], tuple[Model, Feeds]], mutate: Mutation) -> None:
    """The wrong graph, run exactly, stands for an artifact. Most of these are nearer than a quarter."""
    model, feeds = make()
    missed = 0
    for layer in range(len(weights_of(model.ir))):
        wrong = model.ir.clone()
        mutate(wrong, layer)
        outputs = Runner(wrong)(feeds)
        missed += compare(outputs, Runner(model.ir)(feeds)).relative < 0.25
        with pytest.raises(VerificationFailed, match="differs from its QDQ reference"):
            conclude(model, Tolerance(1e-3, "a test", noise=2e-5), feeds, outputs)
    assert missed >= 7


def test_without_noise_the_copy_is_the_reference() -> None:
    model, feeds = convolutions()
    expected = Runner(model.ir)(feeds)
    for name, array in Reference(model.ir, 2e-5)(feeds).items():
        np.testing.assert_array_equal(array, expected[name])


def test_where_nothing_is_rounded_only_the_order_of_sums_is_allowed() -> None:
    model, feeds = lowered(mobilenet(), "float")
    expected = Runner(model.ir)(feeds)
    entry = conclude(model, Tolerance(1e-3, "sums", noise=2e-5), feeds, expected)
    assert (entry["relative"], entry["spread"], entry["allowed"]) == (0.0, 0.0, 1e-3)
    outputs = {name: array * np.float32(1.01) for name, array in expected.items()}
    with pytest.raises(VerificationFailed, match=r"1\.0e-03 \(sums\)"):
        conclude(model, Tolerance(1e-3, "sums"), feeds, outputs)


def test_the_order_of_a_pool_over_a_whole_image_is_allowed_for() -> None:
    """Seen: a pool over 50176 numbers differed enough to flip a code, which noise of 4e-6 never did."""
    net = Net()
    x = net.input("x", ["batch", 2, "height", "width"])
    reference = Reference(net.model(net.op("GlobalAveragePool", net.op("Relu", x))), 4e-6)
    noise = reference._noise_of_sums({"x": np.ones((1, 2, 224, 224), np.float32)})
    assert noise == pytest.approx(224 * 2**-24)
    assert noise > 2 * 4e-6


def test_an_integer_output_may_flip_twice_where_activations_are_rounded() -> None:
    model, feeds = convolutions()

    class Classes(Reference):
        def __call__(self, feeds: Feeds) -> Outputs:
            return {"class": np.arange(100)}

    for flips, noise, refused in [(2, 1e-6, False), (3, 1e-6, True), (1, 0.0, True)]:
        agreement = Agreement("test", Classes(model.ir, 0.0), Tolerance(1e-3, "test", noise), 0)
        got = np.arange(100)
        got[:flips] += 1
        agreement.add(feeds, {"class": got}, None, 8)
        if refused:
            with pytest.raises(VerificationFailed, match="'class', on test inputs"):
                agreement.conclude()
        else:
            assert agreement.conclude()["allowed"] == 0.02
