from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.calibration import Calibration
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.loss import Reference, output_loss
from qcompiler.measure.runner import Runner
from qcompiler.measure.segments import Segment
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.measure.true_loss import FLOAT, TrueLoss, held_back
from qcompiler.model import Model
from qcompiler.plan import SitePlan

SPECS = [parse_spec(f"int{b}-sym-channel-fp32") for b in (2, 3, 4, 8)]
WIDTHS = (12, 16, 20, 16, 15)


def network(samples: int = 64) -> Model:
    """Four layers of products; the first one's weight is used again beside the last one."""
    rng = np.random.default_rng(5)
    tensors = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.4).astype(np.float32), f"w{i}")
        for i, shape in enumerate(itertools.pairwise(WIDTHS))
    ]
    nodes, last = [], "x"
    for i in range(4):
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"], name=f"w{i}"))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        last = f"r{i}"
    nodes[-1] = helper.make_node("Slice", ["x", "from", "to", "axis"], ["few"])
    nodes += [
        helper.make_node("MatMul", ["x", "w0"], ["again"]),
        helper.make_node("Slice", ["again", "from", "to", "axis"], ["beside"]),
        helper.make_node("Add", ["h3", "beside"], ["y"]),
    ]
    nodes = [node for node in nodes if "few" not in node.output]
    bounds = {"from": 0, "to": 15, "axis": 1}
    tensors += [numpy_helper.from_array(np.array([v], np.int64), n) for n, v in bounds.items()]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 12), ("y", 15))]
    graph = helper.make_graph(nodes, "test", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    x = rng.standard_normal((samples, 12)).astype(np.float32)
    return Model(made, calibration=Calibration.from_arrays({"x": x}, made))


def direct(model: Model, assignment: tuple[int, ...], data: Calibration | None = None) -> float:
    """The loss by one run of the whole model."""
    samples = model.calibration if data is None else data
    assert samples is not None
    feeds = next(iter(samples.batches(samples.count)))
    sites = find_sites(model.ir)
    changed = {
        str(site.weight.name): site.from_matrix(quantize(site.matrix(), SPECS[option], method="mse").decode())
        for site, option in zip(sites, assignment, strict=True)
        if option != FLOAT
    }
    runner = Runner(model.ir, replaceable=[str(site.weight.name) for site in sites])
    return output_loss(runner(feeds), runner({**feeds, **changed}))


def truth_of(model: Model, **options) -> TrueLoss:
    sites = find_sites(model.ir)
    return TrueLoss(model, sites, [SPECS] * len(sites), **options)


def test_losses_are_those_of_the_whole_model() -> None:
    model = network()
    truth = truth_of(model)
    assert truth.used == 64
    for assignment in ((0, 0, 0, 0), (3, 1, 2, 0), (FLOAT, 2, FLOAT, 1), (1, FLOAT, FLOAT, FLOAT)):
        assert truth.loss(assignment) == pytest.approx(direct(model, assignment), rel=1e-4)
    assert truth.loss((FLOAT,) * 4) == pytest.approx(0, abs=1e-9)


def test_single_changes_are_what_sensitivities_measures() -> None:
    model = network()
    sites = find_sites(model.ir)
    found = sensitivities(model, sites, [SPECS] * 4, monotone=False)
    truth = truth_of(model)
    assert truth.used == found.samples
    for site in range(4):
        singles = [[option if s == site else FLOAT for s in range(4)] for option in range(4)]
        np.testing.assert_allclose(truth.losses(singles), found.loss[site], rtol=1e-4)
        assert truth.noise(singles[0]) == pytest.approx(found.noise[site][0], rel=1e-4)


def test_shared_prefixes_change_nothing_and_save_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    everything = list(itertools.product(range(4), repeat=4))
    np.random.default_rng(0).shuffle(everything)
    one = truth_of(model)
    expected = [one.loss(assignment) for assignment in everything[:40]]
    runs: list[int] = []
    run = Segment.run

    def counted(self: Segment, *args, **kwargs):
        runs.append(self.index)
        return run(self, *args, **kwargs)

    together = truth_of(model)
    monkeypatch.setattr(Segment, "run", counted)
    found = together.losses(everything)
    np.testing.assert_allclose(found[:40], expected, rtol=1e-5)
    assert together.runs == 256
    assert max(runs) == 4  # the first weight's second use is a segment of its own
    assert len(runs) == 4 + 16 + 64 + 256 + 256  # a tree, instead of 5 * 256


def test_a_killed_enumeration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    everything = list(itertools.product(range(2), repeat=4))
    expected = truth_of(model).losses(everything)
    model.cache = Cache(tmp_path)
    measured: list[int] = []
    losses = Reference.losses

    def killed(self: Reference, outputs):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(1)
        return losses(self, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "losses", killed)
        with pytest.raises(KeyboardInterrupt):
            truth_of(model).losses(everything)
    resumed = truth_of(model)
    np.testing.assert_allclose(resumed.losses(everything), expected, rtol=1e-6)
    assert resumed.runs == len(everything) - 5
    again = truth_of(model)
    np.testing.assert_array_equal(again.losses(everything), resumed.losses(everything))
    assert again.runs == 0
    others = truth_of(model, samples=32)
    others.loss(everything[0])
    assert others.runs == 1


def test_samples_that_measuring_did_not_use() -> None:
    model = network()
    assert model.calibration is not None
    used = sensitivities(model, find_sites(model.ir), [SPECS] * 4, samples=24).samples
    rest = held_back(model, used)
    assert rest is not None
    assert rest.count == 24
    few = model.calibration.spread(24)
    seen, others = ({tuple(row) for row in next(data.batches(64))["x"].tolist()} for data in (few, rest))
    assert not seen & others
    choice = (0, 1, 2, 3)
    assert truth_of(model, data=rest).loss(choice) == pytest.approx(direct(model, choice, rest), rel=1e-4)
    assert truth_of(model, samples=24).loss(choice) == pytest.approx(direct(model, choice, few), rel=1e-4)
    assert held_back(model, 60) is None


def test_several_batches_average() -> None:
    model = network(samples=600)  # at most 512 make a batch: all samples count alike
    truth = truth_of(model, samples=600)
    assert truth.loss((0, 1, 2, 3)) == pytest.approx(direct(model, (0, 1, 2, 3)), rel=1e-4)
    assert truth.parts([(0, 1, 2, 3)]).shape == (1, 16)


def test_equal_formats_are_one_measurement_and_none_is_float() -> None:
    model = network()
    sites = find_sites(model.ir)
    row = [SitePlan(SPECS[0]), SitePlan(SPECS[0], "dynamic"), None]
    truth = TrueLoss(model, sites, {site.name: row for site in sites})
    assert truth.loss((0, 1, 0, 1)) == truth.loss((1, 0, 1, 0)) > 0
    assert truth.runs == 1
    assert truth.loss((2, 2, 2, 2)) == pytest.approx(0, abs=1e-9)


def test_little_memory_changes_nothing() -> None:
    model = network()
    everything = list(itertools.product(range(3), repeat=4))
    np.testing.assert_array_equal(truth_of(model, memory=64).losses(everything), truth_of(model).losses(everything))


def test_differences_are_paired() -> None:
    model = network()
    truth = truth_of(model)
    first, second = (0, 2, 2, 0), (0, 2, 2, 1)
    change, noise = truth.difference(first, second)
    assert change == pytest.approx(truth.loss(first) - truth.loss(second))
    one, two = truth.parts([first, second])
    assert noise == pytest.approx(np.std(one - two, ddof=1) / np.sqrt(8))
    assert truth.difference(first, first) == (0, 0)


def test_wrong_assignments_are_refused() -> None:
    truth = truth_of(network())
    for wrong in ((0, 0, 0), (0, 0, 0, 4), (0, 0, 0, -2)):
        with pytest.raises(ValueError, match=r"assignment|candidate"):
            truth.loss(wrong)
