from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass
from scipy import sparse

from qcompiler.calibration import Calibration
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import find_sites
from qcompiler.measure.decisive import deciding_pairs, pair_terms, sketch_uncertainty, with_terms
from qcompiler.measure.neighbours import neighbours
from qcompiler.measure.rerank import improve, rerank
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.measure.true_loss import FLOAT, TrueLoss
from qcompiler.model import Model
from qcompiler.solvers.problem import Problem

BITS = (2, 3, 4, 8)
SPECS = [parse_spec(f"int{b}-sym-channel-fp32") for b in BITS]
COSTS = np.outer((192, 320, 320, 240), BITS).astype(float)


def network() -> Model:
    """Four layers."""
    rng = np.random.default_rng(7)
    widths = (12, 16, 20, 16, 15)
    tensors = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.4).astype(np.float32), f"w{i}")
        for i, shape in enumerate(itertools.pairwise(widths))
    ]
    nodes, last = [], "x"
    for i in range(4):
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}" if i < 3 else "y"], name=f"w{i}"))
        if i < 3:
            nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        last = f"r{i}"
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 12), ("y", 15))]
    graph = helper.make_graph(nodes, "test", info[:1], info[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = ShapeInferencePass()(ir.from_proto(proto)).model
    x = rng.standard_normal((64, 12)).astype(np.float32)
    return Model(made, calibration=Calibration.from_arrays({"x": x}, made))


@pytest.fixture(scope="module")
def model() -> Model:
    return network()


@pytest.fixture
def truth(model: Model) -> TrueLoss:
    return TrueLoss(model, find_sites(model.ir), [SPECS] * 4)


class Toy(TrueLoss):
    """A truth that is known: 8 parts of a sum of losses and of cross terms."""

    def __init__(self, problem: Problem, noise: float = 0.0) -> None:
        self.problem, self._noise, self.asked = problem, noise, list[tuple[int, ...]]()

    @property
    def sites(self) -> int:
        return self.problem.units

    def parts(self, assignments: Any) -> np.ndarray:
        found = []
        for assignment in assignments:
            self.asked.append(tuple(int(o) for o in assignment))
            chosen = {u: o for u, o in enumerate(self.asked[-1]) if o != FLOAT}
            loss = sum(self.problem.loss[u, o] for u, o in chosen.items())
            if self.problem.cross is not None:
                at = [u * self.problem.loss.shape[1] + o for u, o in chosen.items()]
                loss += self.problem.cross[np.ix_(at, at)].sum() / 2
            spread = np.random.default_rng(abs(hash(self.asked[-1]))).standard_normal(8)
            found.append(loss + self._noise * (spread - spread.mean()))
        return np.array(found)


def toy(seed: int = 0, cross: float = 0.3, ties: tuple[tuple[int, ...], ...] = (), units: int = 4) -> Problem:
    rng = np.random.default_rng(seed)
    loss = np.exp(rng.normal(0, 1, (units, 1))) * 4.0 ** -np.array(BITS, float)
    size = np.sqrt(2 * np.repeat(loss, 1, 0)).ravel()
    matrix = cross * rng.standard_normal((units * 4, units * 4)) * np.outer(size, size)
    matrix = (matrix + matrix.T) / 2
    for unit in range(units):
        matrix[unit * 4 : unit * 4 + 4, unit * 4 : unit * 4 + 4] = 0
    costs = np.outer(rng.integers(1, 5, units), BITS).astype(float)
    return Problem(loss, {"bits": costs}, {"bits": float(costs.mean(1).sum())}, ties, matrix if cross else None)


def feasible(problem: Problem) -> list[np.ndarray]:
    groups = {unit: group for group in problem.ties for unit in group}
    every = (np.array(c, np.intp) for c in itertools.product(range(4), repeat=problem.units))
    tied = (c for c in every if all(c[u] == c[g[0]] for u, g in groups.items()))
    return [c for c in tied if problem.feasible(c)]


def measured_problem(model: Model, bits: float = 3.6) -> Problem:
    found = sensitivities(model, find_sites(model.ir), [SPECS] * 4)
    cross = found.cross()[1]
    np.fill_diagonal(cross, 0)
    return Problem(np.array(found.loss), {"bits": COSTS}, {"bits": bits * COSTS[:, 0].sum() / 2}, cross=cross)


def test_the_best_of_the_list_is_taken(model: Model, truth: TrueLoss) -> None:
    problem = measured_problem(model)
    choices = sorted(feasible(problem), key=problem.objective)[:12]
    predicted = [problem.objective(c) for c in choices]
    found = rerank(truth, choices, predicted)
    losses = [truth.loss(c) for c in choices]
    np.testing.assert_allclose(found.true, losses)
    np.testing.assert_array_equal(found.choice, choices[int(np.argmin(losses))])
    assert found.gain == pytest.approx(losses[0] - min(losses))
    assert found.noise == truth.difference(choices[0], found.choice)[1]
    assert rerank(truth, choices[:1], predicted[:1]).index == 0


def test_a_margin_keeps_the_prediction_where_the_noise_is_large() -> None:
    problem = toy(1)
    choices = sorted(feasible(problem), key=problem.objective)[:6][::-1]
    predicted = [problem.objective(c) for c in choices]
    assert rerank(Toy(problem), choices, predicted, margin=3.0).index == 5
    assert rerank(Toy(problem, noise=100.0), choices, predicted, margin=3.0).index == 0
    assert rerank(Toy(problem, noise=100.0), choices, predicted).index == 5


def test_where_losses_add_up_the_truth_changes_nothing() -> None:
    for seed in range(5):
        problem = toy(seed, cross=0.0)
        choices = sorted(feasible(problem), key=problem.objective)[:8]
        found = rerank(Toy(problem), choices, [problem.objective(c) for c in choices])
        assert (found.index, found.gain) == (0, 0.0)
        assert improve(Toy(problem), problem, choices[0], 20).steps == (pytest.approx(problem.objective(choices[0])),)


def test_wrong_lists_are_refused(truth: TrueLoss) -> None:
    for choices, predicted in (([], []), ([np.zeros(4, np.intp)], [1.0, 2.0])):
        with pytest.raises(ValueError, match="predictions for"):
            rerank(truth, choices, predicted)


@pytest.mark.parametrize("ties", [(), ((0, 2),)])
@pytest.mark.parametrize("kind", ["dense", "sparse", "none"])
def test_neighbours_are_all_feasible_changes_of_one_or_two_units(kind: str, ties: tuple[tuple[int, ...], ...]) -> None:
    plain = toy(3, ties=ties)
    cross = {"dense": plain.cross, "sparse": sparse.csr_array(plain.cross), "none": None}[kind]
    problem = Problem(plain.loss, plain.costs, plain.budgets, ties, cross)
    every = feasible(problem)
    start = min(every, key=problem.objective)
    found = list(neighbours(problem, start))
    own = list(range(4)) if not ties else [0, 1, 0, 3]
    expected = {tuple(c) for c in every if 1 <= len({own[u] for u in np.flatnonzero(c != start)}) <= 2}
    assert {tuple(c) for c, _ in found} == expected
    assert len(found) == len(expected)
    changes = [change for _, change in found]
    assert changes == sorted(changes)
    for choice, change in found:
        assert change == pytest.approx(problem.objective(choice) - problem.objective(start), abs=1e-12)


def test_neighbours_of_a_large_problem_are_few_and_feasible() -> None:
    problem = toy(4, units=300)
    start = np.zeros(300, np.intp)
    best, change = next(neighbours(problem, start))
    assert problem.feasible(best)
    assert change == pytest.approx(problem.objective(best) - problem.objective(start))
    assert (best != start).sum() == 2


def test_improving_never_makes_worse_and_stays_within_its_runs(model: Model, truth: TrueLoss) -> None:
    problem = measured_problem(model)
    rng = np.random.default_rng(0)
    every = feasible(problem)
    better = 0
    for _ in range(8):
        start = every[rng.integers(len(every))]
        before = truth.loss(start)
        runs = int(rng.integers(0, 30))
        asked = truth.runs
        found = improve(truth, problem, start, runs)
        assert problem.feasible(found.choice)
        assert found.loss == truth.loss(found.choice) <= before
        assert found.runs <= runs
        assert truth.runs - asked <= runs
        assert all(np.diff(found.steps) < 0)
        better += found.loss < before
    assert better > 3
    with pytest.raises(ValueError, match="not feasible"):
        improve(truth, problem, np.full(4, 3), 4)


def test_a_long_search_ends_where_no_neighbour_is_better() -> None:
    problem = toy(5)
    lies = Problem(problem.loss, problem.costs, problem.budgets, cross=-problem.cross)
    found = improve(Toy(problem), lies, feasible(problem)[0], 10_000)
    assert min(change for _, change in neighbours(problem, found.choice)) >= -1e-12
    assert found.runs < 10_000


def test_pair_terms_are_what_two_changes_add(truth: TrueLoss) -> None:
    (term,) = pair_terms(truth, [(0, 1, 2, 0)])
    alone = truth.loss((1, FLOAT, FLOAT, FLOAT)) + truth.loss((FLOAT, FLOAT, 0, FLOAT))
    assert term == pytest.approx(truth.loss((1, FLOAT, 0, FLOAT)) - alone)
    problem = toy(6)
    pairs = [(0, 1, 2, 0), (1, 3, 3, 2)]
    np.testing.assert_allclose(pair_terms(Toy(problem), pairs), [problem.cross[1, 8], problem.cross[7, 14]])
    for cross in (np.zeros((16, 16)), sparse.csr_array((16, 16))):
        changed = with_terms(cross, 4, pairs, np.array([0.5, np.nan]))
        assert changed[1, 8] == changed[8, 1] == 0.5
        assert abs(changed).sum() == 1
        assert abs(cross).sum() == 0


def test_measuring_the_deciding_pairs_finds_the_best_choice() -> None:
    """From cross terms of zero to the optimum of the true problem, by few of its 96 pairs."""
    measured, optimal = [], 0
    for seed in range(10):
        true = toy(seed, cross=0.2)
        every = feasible(true)
        known: list[tuple[int, int, int, int]] = []
        cross = np.zeros((16, 16))
        while True:
            problem = Problem(true.loss, true.costs, true.budgets, cross=cross)
            ranked = sorted(every, key=problem.objective)
            spread = sketch_uncertainty(problem, share=0.2, known=known)
            pairs = deciding_pairs(problem, ranked[0], ranked[1:8], spread)
            if not pairs:
                break
            assert not set(pairs) & set(known)
            known += pairs[:6]
            cross = with_terms(cross, 4, pairs[:6], pair_terms(Toy(true), pairs[:6]))
        measured.append(len(known))
        optimal += true.objective(ranked[0]) == pytest.approx(min(map(true.objective, every)))
    assert optimal >= 9
    assert 0 < np.mean(measured) < 60


def test_certain_decisions_need_no_pairs() -> None:
    problem = toy(0)
    ranked = sorted(feasible(problem), key=problem.objective)
    assert deciding_pairs(problem, ranked[0], ranked[1:5], sketch_uncertainty(problem, share=1e-9)) == []
    spread = sketch_uncertainty(problem, share=0.5)
    pairs = deciding_pairs(problem, ranked[0], ranked[1:2], spread)
    differ = set(np.flatnonzero(ranked[0] != ranked[1]).tolist())
    assert pairs
    for u, a, v, b in pairs:
        assert u < v
        assert differ & {u, v}
        assert (a, b) in {(c[u], c[v]) for c in ranked[:2]}
