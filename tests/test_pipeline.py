"""Pipelines: TOML there and back, what is wrong is named, contracts are held."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import registry
from qcompiler.build.recipe import Options, fill
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, ContractViolated, PassRefused
from qcompiler.model import Model
from qcompiler.options import _fits
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.pipeline import EXACT, Pass, PassReport, Pipeline
from qcompiler.progress import Progress


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the weight, which is exact for a factor of 1 only."""

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    factor: float = 1.0

    def run(self, model: Model, progress: Progress) -> PassReport:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.factor), name="w")
        return PassReport("scale", 1)


@dataclass(frozen=True)
class Shy(Pass):
    """Never runs."""

    def requires(self, model: Model) -> None:
        raise PassRefused("not this one", "shy")

    def run(self, model: Model, progress: Progress) -> PassReport:
        raise AssertionError("it refused")


@pytest.fixture
def model() -> Model:
    rng = np.random.default_rng(0)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["n", 8])
    w = ir.val("w", const_value=ir.tensor(rng.normal(size=(8, 4)).astype("f"), name="w"))
    node = ir.node("MatMul", [x, w])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(["n", 4])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 21}, name="g")
    made = Model(ir.Model(graph, ir_version=10))
    made.calibration = Calibration.from_arrays({"x": rng.normal(size=(4, 8)).astype("f")}, made.ir)
    return made


PIPELINES = [
    Pipeline([]),
    Pipeline([Uniform(), InsertQDQ()]),
    Pipeline([Allocate(("3.5bits", "1MB"), bits=(2, 4), activations="static", keep=('a"b\\c',), seconds=1.5)]),
]


LEVELS = """
[[pass]]
name = "nearest"
effort = "low"

[[pass]]
name = "gptq"
effort = ["default", "high"]

[[pass]]
name = "insert-qdq"
"""


@pytest.mark.parametrize(("effort", "first"), [("low", "nearest"), ("default", "gptq"), ("high", "gptq")])
def test_passes_are_there_for_their_efforts(effort: str, first: str) -> None:
    found = Pipeline.from_toml(LEVELS, effort=effort, asked=True)
    assert [item.registered_name() for item in found.passes] == [first, "insert-qdq"]
    assert Pipeline.from_toml(found.to_toml()) == found


@pytest.mark.parametrize("value", ["'much'", "3", "[]", "['low', 3]"])
def test_unknown_efforts_are_named(value: str) -> None:
    with pytest.raises(BadOption, match="effort of pass 'nearest'"):
        Pipeline.from_toml(f"[[pass]]\nname = 'nearest'\neffort = {value}", "here")


def test_an_effort_that_leaves_no_pass_is_refused() -> None:
    with pytest.raises(BadOption, match="no pass is there for effort 'default'"):
        Pipeline.from_toml("[[pass]]\nname = 'nearest'\neffort = 'low'", "here")


def test_an_effort_that_makes_no_difference_is_refused() -> None:
    with pytest.raises(BadOption, match="no pass of this pipeline depends on the effort"):
        Pipeline.from_toml("[[pass]]\nname = 'nearest'", "here", "low", asked=True)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_toml_there_and_back(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(pipeline.to_toml() or "pass = []")
    assert Pipeline.load(path) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pass", "not valid TOML"),
        ("x = 1", "list of"),
        ("pass = 3", "list of"),
        ("[[pass]]\nspec = 'int4'", "has no name"),
        ("[[pass]]\nname = 'nothing'", "here: there is no pass 'nothing'; choose one of absorb"),
        ("[[pass]]\nname = 'uniform'\ncolour = 'red'", "no option 'colour'"),
        ("[[pass]]\nname = 'uniform'\nspec = 4", "option 'spec'"),
        ("[[pass]]\nname = 'uniform'\nspec = 'int99'", "int"),
        ("[[pass]]\nname = 'allocate'\nsamples = 'many'", "option 'samples'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        Pipeline.from_toml(text, "here")


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("allocate", "budget = 4", 'give a text or a list, each a text, such as ["4bits"]'),
        ("allocate", "budget = [4, '1MB']", "a list, each a text"),
        ("allocate", "bits = ['4']", "a list, each a whole number"),
        ("allocate", "bits = [4.0]", "a list, each a whole number"),
        ("allocate", "group_sizes = 1.5", "give a list, each a whole number"),
        ("allocate", "samples = true", "give a whole number, such as 0"),
        ("allocate", "seconds = '4'", "give a number, such as 240.0"),
        ("allocate", "seconds = true", "give a number, such as 240.0"),
        ("allocate", "seconds = 1979-05-27", "give a number, such as 240.0"),
        ("equalize", "clips = 1", "give true or false, such as false"),
        ("uniform", "keep = {a = 1}", "give a list, each a text"),
        ("gptq", "order = 'random'", 'give "diagonal" or "natural"'),
        ("gptq", "sweeps = [3]", "give a whole number, such as 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_what_is_expected(name: str, line: str, expected: str) -> None:
    option = line.split(" = ", maxsplit=1)[0]
    with pytest.raises(BadOption) as caught:
        Pipeline.from_toml(f"[[pass]]\nname = '{name}'\n{line}", "here")
    assert str(caught.value).startswith(f"here: option '{option}' of pass '{name}' is ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        (
            "uniform",
            "spec = 'int4-g0'",
            "option 'spec' of pass 'uniform' is 'int4-g0': group size 0 is not positive; use",
        ),
        ("uniform", "spec = 'int1'", "option 'spec' of pass 'uniform' is 'int1': an integer format of 1 bits"),
        ("uniform", "embeddings = 'x'", "option 'embeddings' of pass 'uniform' is 'x': unknown format 'x'; write"),
        ("uniform", "activation = 'int8'", "option 'activation' of pass 'uniform' is 'int8': unknown activation mode"),
        (
            "uniform",
            "activation = 'static'\nactivation_bits = 5",
            "option 'activation_bits' of pass 'uniform' is 5: static",
        ),
        ("allocate", "budget = 'abc'", "option 'budget' of pass 'allocate' is 'abc': budget 'abc' is not an amount"),
        ("allocate", "bits = [9]", "option 'bits' of pass 'allocate' is (9,): bits cannot be [9]; give widths"),
        ("allocate", "method = 'best'", "option 'method' of pass 'allocate' is 'best': unknown name 'best'; choose"),
        (
            "allocate",
            "mixed_blocks = ['int4']",
            "option 'mixed_blocks' of pass 'allocate' is ('int4',): 'int4' has one",
        ),
        ("allocate", "rerank = 0\npairs = 1", "option 'rerank' of pass 'allocate' is 0: rerank must be 1 or more"),
        (
            "allocate",
            "pairs = 4\npareto = 9",
            "options 'pairs' and 'pareto' of pass 'allocate': pairs of 4 bits cannot",
        ),
        ("adadim", "samples = 0", "option 'samples' of pass 'adadim' is 0: 0 samples say nothing; give 1 or more"),
        ("nearest", "samples = 0", "option 'samples' of pass 'nearest' is 0; give 1 or more"),
        ("gptq", "follow = 2.0", "option 'follow' of pass 'gptq' is 2.0: follow 2 is no share of the error; give"),
        ("adaround", "steps = 0", "option 'steps' of pass 'adaround' is 0; give 1 or more"),
        ("adaquant", "rate = -1.0", "option 'rate' of pass 'adaquant' is -1.0; give 0 or more"),
        ("tune", "epochs = 0\nsamples = 9", "option 'epochs' of pass 'tune' is 0; give 1 or more"),
        ("tune", "bias_rate = nan", "option 'bias_rate' of pass 'tune' is nan; give 0 or more"),
        ("bias-correction", "tokens = -1", "option 'tokens' of pass 'bias-correction' is -1; give 1 or more"),
        (
            "activation-ranges",
            "percentile = 0.0",
            "option 'percentile' of pass 'activation-ranges' is 0.0: a percentile",
        ),
        ("activation-ranges", "judges = 0", "option 'judges' of pass 'activation-ranges' is 0; give 1 or more"),
        ("channel-order", "block = 0", "option 'block' of pass 'channel-order' is 0: blocks of 0, theta"),
        ("smooth", "strength = 2.0", "option 'strength' of pass 'smooth' is 2.0: a strength of 2.0 is not between"),
        (
            "scale-fold",
            "percentile = 101.0",
            "option 'percentile' of pass 'scale-fold' is 101.0: a percentile of 101.0",
        ),
        ("mobilequant", "epochs = 0", "option 'epochs' of pass 'mobilequant' is 0; give 1 or more"),
        ("awq", "spec = 'int99'", "option 'spec' of pass 'awq' is 'int99': an integer format of 99 bits"),
        ("choose-transforms", "among = ['smooth: strength = 7.0']", "option 'among' of pass 'choose-transforms' is"),
        ("choose-rounding", "among = ['gptq: samples = 0']", "option 'among' of pass 'choose-rounding' is ('gptq: sam"),
    ],
)
def test_a_value_that_a_pass_refuses_is_told_with_file_pass_option_and_reason(name: str, lines: str, told: str) -> None:
    with pytest.raises(BadOption) as caught:
        Pipeline.from_toml(f"[[pass]]\nname = '{name}'\n{lines}", "here.toml")
    assert str(caught.value).startswith(f"here.toml: {told}")


def test_an_option_that_is_wrong_for_the_model_is_told_with_file_and_pass(model: Model) -> None:
    """A pass that sees only when it runs what is wrong."""
    with pytest.raises(BadOption, match=r"here.toml, pass 'awq': .*plan"):
        Pipeline.from_toml("[[pass]]\nname = 'awq'", "here.toml").run(model)
    narrow = Pipeline.from_toml(
        "[[pass]]\nname = 'allocate'\nactivations = 'dynamic'\nactivation_bits = 4", "here.toml"
    )
    asked = Options("onnx", activations="static", given=frozenset({"activations"}))
    with pytest.raises(BadOption, match=r"here.toml, allocate: static activations have no width"):
        fill(narrow, asked)
    with pytest.raises(BadOption, match=r"here.toml, pass 'uniform': target onnx stores no weight"):
        Pipeline.from_toml("[[pass]]\nname = 'uniform'\nspec = 'int9'", "here.toml").foresee(model)


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("bits = 4", "bits", (4,)),
        ("bits = [2, 4]", "bits", (2, 4)),
        ("seconds = 3", "seconds", 3),
        ("budget = '3bits'", "budget", ("3bits",)),
        ("keep = 'embeddings'", "keep", ("embeddings",)),
        ("keep = []", "keep", ()),
    ],
)
def test_values_that_mean_the_type_are_taken(line: str, option: str, value: object) -> None:
    assert getattr(Pipeline.from_toml(f"[[pass]]\nname = 'allocate'\n{line}").passes[0], option) == value


@pytest.mark.parametrize(("value", "kind"), [((1, "a"), tuple[int, str]), (5, Any), ({"a": 1}, dict[str, int])])
def test_options_of_other_packages_may_have_any_type(value: object, kind: object) -> None:
    assert _fits(value, kind)
    assert not _fits(value, bool)
    assert not _fits(value, tuple[int, int])


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="cannot be read"):
        Pipeline.load(tmp_path / "gone.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadOption, match="cannot be read"):
        Pipeline.load(tmp_path / "binary.toml")


def test_reports_come_one_a_pass_with_their_time(model: Model) -> None:
    reports = Pipeline([Scale(), Scale()]).run(model)
    assert [report.name for report in reports] == ["scale", "scale"]
    assert all(report.seconds > 0 for report in reports)


def test_a_broken_contract_is_found_and_names_the_pass(model: Model) -> None:
    with pytest.raises(ContractViolated, match="y"):
        Pipeline([Scale(1.01)]).run(model)


def test_without_verify_nothing_is_checked(model: Model) -> None:
    assert len(Pipeline([Scale(1.01)], verify=False).run(model)) == 1


def test_a_refusal_of_a_pass_stops_the_pipeline_before_it_changes_anything(model: Model) -> None:
    with pytest.raises(PassRefused, match="not this one"):
        Pipeline([Shy(), Scale(2.0)]).run(model)
    assert model.graph.initializers["w"].const_value is not None


def test_passes_know_the_name_they_are_registered_under() -> None:
    assert Uniform.registered_name() == "uniform"
    assert Scale.registered_name() == "Scale"
    assert set(registry.names("passes")) >= {"uniform", "allocate", "insert-qdq"}


def test_passes_of_other_packages_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    def points(group: str) -> list[EntryPoint]:
        return [EntryPoint("other", "qcompiler.passes.plan.uniform:Uniform", group)]

    monkeypatch.setattr(registry, "entry_points", points)
    registry.names.cache_clear()
    try:
        assert Pipeline.from_toml("[[pass]]\nname = 'other'").passes == [Uniform()]
    finally:
        monkeypatch.undo()
        registry.names.cache_clear()
