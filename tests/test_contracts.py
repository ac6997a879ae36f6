from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from qcompiler.calibration import Calibration
from qcompiler.errors import ContractViolated
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.pipeline import EXACT, Pass, PassReport, Pipeline
from qcompiler.progress import Progress
from tests.graph.architectures import ARCHITECTURES, WIDTH, inject_outliers


@dataclass(frozen=True)
class Edit(Pass):
    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    change: Callable[[ir.Model], object] = lambda model: None

    def run(self, model: Model, progress: Progress) -> PassReport:
        self.change(model.ir)
        return PassReport("edit", 1)


def weight(model: ir.Model, name: str) -> ir.Value:
    return next(s for s in find_sites(model) if s.name == name).weight


def multiply(value: ir.Value, factor: float | np.ndarray) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name=value.name)


def smooth(model: ir.Model) -> None:
    for site in find_sites(model):
        if site.activation is not None:
            fold = find_fold(model, site.activation)
            if isinstance(fold, Fold):
                fold.scale(fold.tied(np.linspace(0.5, 2, fold.size)))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma", "vit", "opt"])
def test_an_exact_pass_is_accepted_with_outliers_too(name: str) -> None:
    model = Model(ARCHITECTURES[name]())
    inject_outliers(model.ir)
    assert Pipeline([Edit(smooth)]).run(model)[0].changed == 1


def test_names_the_pass_the_output_and_where_it_starts() -> None:
    model = Model(ARCHITECTURES["llama"]())

    def wrong(graph: ir.Model) -> None:
        smooth(graph)
        multiply(weight(graph, "1.up"), 1.01)

    with pytest.raises(ContractViolated, match=r"pass 'Edit' changed the function: 'matmul_114_0'") as error:
        Pipeline([Edit(wrong)]).run(model)
    up = next(n for n in model.graph if n.inputs[1:2] == (weight(model.ir, "1.up"),))
    assert up.outputs[0].name is not None
    assert f"'{up.outputs[0].name}' of MatMul" in str(error.value)


def test_a_difference_that_only_outliers_show_is_found() -> None:
    """Clipping far above the range of the samples changes nothing until a channel is a hundred times larger."""
    model = Model(ARCHITECTURES["llama"]())

    def clip(graph: ir.Model) -> None:
        node = next(n for n in graph.graph if n.op_type == "Gather")
        value = node.outputs[0]
        users = list(value.uses())
        bounds = [ir.val(n, const_value=ir.tensor(np.float32(b), name=n)) for n, b in (("lo", -9), ("hi", 9))]
        for bound in bounds:
            graph.graph.register_initializer(bound)
        clipped = ir.node("Clip", [value, *bounds])
        clipped.outputs[0].name = "clipped"
        clipped.outputs[0].type, clipped.outputs[0].shape = value.type, value.shape
        graph.graph.insert_after(node, clipped)
        for user, index in users:
            user.replace_input_with(index, clipped.outputs[0])

    with pytest.raises(ContractViolated):
        Pipeline([Edit(clip)]).run(model)
    assert Pipeline([Edit(clip)], verify=False).run(Model(ARCHITECTURES["llama"]()))[0].changed == 1


def test_changed_outputs_are_violations() -> None:
    model = Model(ARCHITECTURES["llama"]())

    def rename(graph: ir.Model) -> None:
        graph.graph.outputs[0].name = "renamed"

    with pytest.raises(ContractViolated, match="changed the outputs"):
        Pipeline([Edit(rename)]).run(model)


def test_rounding_noise_is_no_violation() -> None:
    """A model that amplifies the last bit of its weights is compared with what that last bit does."""
    model = ARCHITECTURES["llama"]()
    for name in ("0.q", "0.k", "1.q", "1.k"):
        multiply(weight(model, name), 30.0)

    def reorder(graph: ir.Model) -> None:
        multiply(weight(graph, "0.o"), (1 + 2.0**-22) * np.ones((WIDTH, WIDTH)))

    assert Pipeline([Edit(reorder)]).run(Model(model))[0].changed == 1


def test_the_factors_of_a_resize_are_no_noise() -> None:
    """A last bit less than twice the size of 9 pixels is 17, which would not fit the other branch."""
    factors = ", ".join(f"float[4] sizes{i} = {{1, 1, 2, 2}}" for i in range(4))
    resize = 'Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric">'
    sums = "\n".join(f"large{i} = {resize} (small, , sizes{i})\n y{i} = Add (large{i}, x)" for i in range(4))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    agraph (float[N, 2, 18, 18] x) => (float[N, 8, 18, 18] y) <float[2, 2, 1, 1] weight = {{1, -0.5, 0.25, 2}},
     {factors}>
    {{ small = Conv <strides = [2, 2]> (x, weight)
      {sums}
      y = Concat <axis = 1> (y0, y1, y2, y3) }}"""
    model = ir.from_onnx_text(text)
    with pytest.raises(ContractViolated, match="'y' differs"):
        Pipeline([Edit(lambda graph: multiply(graph.graph.initializers["weight"], 1.01))]).run(Model(model))


def test_a_float_input_that_becomes_indices_is_fed_no_outliers() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        agraph (float[n, 3] x) => (float[n, 3, 4] y) <float[10, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
        15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40}>
        { i = Cast <to = 7> (x)  y = Gather (w, i) }"""
    model = Model(ir.from_proto(onnx.shape_inference.infer_shapes(parser.parse_model(text))))
    ids = np.random.default_rng(0).integers(1, 10, (8, 3)).astype(np.float32)
    model.calibration = Calibration.from_arrays({"x": ids}, model.ir)
    assert Pipeline([Edit()]).run(model)[0].changed == 1
    with pytest.raises(ContractViolated):
        Pipeline([Edit(lambda graph: multiply(weight(graph, "w"), 1.5))]).run(model)
