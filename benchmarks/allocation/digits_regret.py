"""Regret of allocations by what they were predicted from, on a net where every allocation can be tried.

    python benchmarks/allocation/digits_regret.py [--seeds 0,1,2,3,4] [--cache DIR]

For each seed a net is trained, its 4096 allocations of 2, 3, 4 and 8 bits are measured on 256 calibration images
(and on 512 others), and for 19 budgets from 2.3 to 5 bits each method's choice is compared with the best: regret =
true loss of the choice / least true loss within the budget. Choices are exact minima of the predictions, by
enumeration, so solvers play no part. Prints a Markdown table: the median over the budgets and the worst budget of
each seed, and mean and worst over all.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from digits import BITS, SPECS, Digits, digits

from qcompiler.measure.cache import Cache
from qcompiler.measure.decisive import deciding_pairs, pair_terms, sketch_uncertainty, with_terms
from qcompiler.measure.pairwise import pairwise_sensitivities
from qcompiler.measure.quadratic import fill_within, project_psd, unconstrained
from qcompiler.measure.rerank import improve, rerank
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.measure.true_loss import TrueLoss
from qcompiler.solvers.problem import Problem

Floats = npt.NDArray[np.float64]
SITES = 6
BUDGETS = np.arange(2.3, 5.01, 0.15)
EVERY = np.array(list(itertools.product(range(len(BITS)), repeat=SITES)), np.intp)
TOP = 8
RUNS = 16  # for a local search
FEW = 64  # samples
Method = Callable[[Problem], npt.NDArray[np.intp]]


@dataclass
class Truth:
    """One net, all of its allocations, and counts of what methods measured."""

    net: Digits
    loss: TrueLoss
    every: Floats
    unseen: Floats
    bits: Floats
    pairs: int = 0
    choices: int = 0

    def problem(self, gram: Floats, budget: float) -> Problem:
        """The problem that a loss matrix predicts for a budget in bits."""
        cross = gram.copy()
        np.fill_diagonal(cross, 0)
        costs = np.outer(self.net.sizes, BITS)
        limit = budget * float(self.net.sizes.sum())
        return Problem(np.diag(gram).reshape(SITES, -1) / 2, {"bits": costs}, {"bits": limit}, cross=cross)

    def ranked(self, problem: Problem) -> tuple[npt.NDArray[np.intp], Floats]:
        """All feasible choices, best prediction first, and their predictions."""
        at = EVERY + np.arange(SITES) * len(BITS)
        predicted = problem.loss.ravel()[at].sum(1) + problem.cross[at[:, :, None], at[:, None, :]].sum((1, 2)) / 2
        inside = np.flatnonzero(self.bits <= problem.budgets["bits"] / self.net.sizes.sum())
        order = inside[np.argsort(predicted[inside], kind="stable")]
        return EVERY[order], predicted[order]


def truth_of(net: Digits) -> Truth:
    loss = TrueLoss(net.model, net.sites, [SPECS] * SITES)
    unseen = TrueLoss(net.model, net.sites, [SPECS] * SITES, data=net.test.take(512), samples=512)
    bits = (net.sizes * np.array(BITS)[EVERY]).sum(1) / net.sizes.sum()
    return Truth(net, loss, loss.losses(EVERY), unseen.losses(EVERY), bits)


def methods(truth: Truth) -> dict[str, tuple[Floats, Method]]:
    """Loss matrices, and what is done with each."""
    net, menus = truth.net, [SPECS] * SITES
    measured = sensitivities(net.model, net.sites, menus, effort="full")
    starts, gram = measured.cross()
    clado = pairwise_sensitivities(net.model, net.sites, menus, single=measured).cross()[1]
    sketches = np.concatenate(measured.sketches).astype(np.float64)
    few = sensitivities(net.model, net.sites, menus, effort="full", samples=FEW)
    few_truth = TrueLoss(net.model, net.sites, menus, samples=FEW)

    def best(problem: Problem) -> npt.NDArray[np.intp]:
        return truth.ranked(problem)[0][0]

    def reranked(judge: TrueLoss, margin: float = 0.0) -> Method:
        def choose(problem: Problem) -> npt.NDArray[np.intp]:
            choices, predicted = truth.ranked(problem)
            return rerank(judge, list(choices[:TOP]), predicted[:TOP], margin).choice

        return choose

    def cautious(margin: float, count: int) -> Method:
        def choose(problem: Problem) -> npt.NDArray[np.intp]:
            choices, predicted = truth.ranked(problem)
            plain = best(replace(problem, cross=np.zeros_like(problem.cross)))
            chosen = [plain, *(c for c in choices[:count] if not np.array_equal(c, plain))][:count]
            return rerank(truth.loss, chosen, predicted[: len(chosen)], margin).choice

        return choose

    def searched(problem: Problem) -> npt.NDArray[np.intp]:
        found = improve(truth.loss, problem, best(problem), RUNS)
        truth.choices += found.runs
        return found.choice

    def both(problem: Problem) -> npt.NDArray[np.intp]:
        found = improve(truth.loss, problem, reranked(truth.loss)(problem), RUNS)
        truth.choices += found.runs
        return found.choice

    reliable = measured.reliable_cross()[1]
    return {
        "diagonal": (np.diag(np.diag(gram)), best),
        "Gram, shrunk by reliability, + true diagonal": (reliable, best),
        **{
            f"... + diagonal and top {n - 1} re-ranked, margin {margin}": (reliable, cautious(margin, n))
            for n in (4, 8)
            for margin in (0.0, 1.0, 2.0)
        },
        "CLADO raw": (clado, best),
        "CLADO projected": (project_psd(clado), best),
        "CLADO projected, within-site terms filled": (project_psd(fill_within(starts, clado)), best),
        "Gram": (sketches @ sketches.T * (gram != 0), best),
        "Gram + true diagonal": (gram, best),
        f"... + top {TOP} re-ranked (default)": (gram, reranked(truth.loss)),
        f"... + top {TOP} re-ranked, margin 0.5": (gram, reranked(truth.loss, 0.5)),
        f"... + top {TOP} re-ranked, margin 2": (gram, reranked(truth.loss, 2.0)),
        f"... + search of {RUNS} runs, no re-ranking": (gram, searched),
        f"... + re-ranked, then search of {RUNS} runs": (gram, both),
        "... + deciding pairs measured": (gram, lambda problem: actively(truth, problem)),
        f"diagonal + top {TOP} re-ranked": (np.diag(np.diag(gram)), reranked(truth.loss)),
        f"Gram + true diagonal of {FEW} samples": (few.cross()[1], best),
        f"... re-ranked on the same {FEW}": (few.cross()[1], reranked(few_truth)),
        "... re-ranked on all 256": (few.cross()[1], reranked(truth.loss)),
    }


def actively(truth: Truth, problem: Problem) -> npt.NDArray[np.intp]:
    """Measure the pairs that decide between the best eight, four at a time; at most as many as a re-ranking runs."""
    known: list[tuple[int, int, int, int]] = []
    current = problem
    while True:
        choices, _ = truth.ranked(current)
        spread = sketch_uncertainty(current, known=known)
        pairs = deciding_pairs(current, choices[0], list(choices[1:TOP]), spread)[: min(4, TOP - len(known))]
        if not pairs:
            truth.pairs += len(known)
            return choices[0]
        known += pairs
        cross = with_terms(current.cross, len(BITS), pairs, pair_terms(truth.loss, pairs))
        current = Problem(problem.loss, problem.costs, problem.budgets, cross=cross)


def regrets(truth: Truth, gram: Floats, method: Method) -> tuple[Floats, Floats]:
    """Regret at every budget, on the calibration images and on the unseen ones."""
    powers = len(BITS) ** np.arange(SITES)[::-1]
    found: list[tuple[float, float]] = []
    for budget in BUDGETS:
        problem = truth.problem(gram, float(budget))
        index = int(method(problem) @ powers)
        inside = truth.bits <= problem.budgets["bits"] / truth.net.sizes.sum()
        assert inside[index]
        pair = truth.every[index] / truth.every[inside].min(), truth.unseen[index] / truth.unseen[inside].min()
        found.append((float(pair[0]), float(pair[1])))
    return np.array([f[0] for f in found]), np.array([f[1] for f in found])


def errors_of_sketches(gram: Floats, clado: Floats) -> float:
    """Standard deviation of the cross terms' error, as a share of the bound sqrt(G_aa G_bb)."""
    between = np.kron(1 - np.eye(SITES), np.ones((len(BITS), len(BITS)))) > 0
    size = np.sqrt(np.diag(gram))
    return float(((clado - gram) / np.outer(size, size))[between].std())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    table: dict[str, list[tuple[Floats, Floats]]] = {}
    for seed in seeds:
        net = digits(seed)
        net.model.cache = None if arguments.cache is None else Cache(arguments.cache)
        clock = time.monotonic()
        truth = truth_of(net)
        seconds = time.monotonic() - clock
        matrices = methods(truth)
        gram, clado = matrices["Gram + true diagonal"][0], matrices["CLADO raw"][0]
        starts, last = np.arange(SITES + 1) * len(BITS), len(BITS) - 1
        sane = {
            name: bool((unconstrained(starts, matrix, [last] * SITES) == starts[:-1] + last).all())
            for name, matrix in (("CLADO raw", clado), ("Gram + true diagonal", gram))
        }
        for name, (matrix, method) in matrices.items():
            table.setdefault(name, []).append(regrets(truth, matrix, method))
        print(
            f"seed {seed}: accuracy {net.accuracy:.3f}, 2 x 4096 allocations in {seconds:.0f} s; error of sketches "
            f"{errors_of_sketches(gram, clado):.3f} of the bound; widest everywhere without a budget: {sane}; "
            f"pairs measured a budget {truth.pairs / len(BUDGETS):.1f}, "
            f"runs of a search {truth.choices / 2 / len(BUDGETS):.1f}",
            flush=True,
        )
    show(table, seeds)


def show(table: dict[str, list[tuple[Floats, Floats]]], seeds: list[int]) -> None:
    """Markdown."""
    heads = [*(f"seed {seed}" for seed in seeds), "median", "mean", "worst", "unseen median, mean, worst"]
    print(f"\n| method | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, rows in table.items():
        cells = [f"{np.median(seen):.3f} / {seen.max():.3f}" for seen, _ in rows]
        seen, unseen = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
        cells += [f"{np.median(seen):.3f}", f"{seen.mean():.3f}", f"{seen.max():.3f}"]
        cells += [f"{np.median(unseen):.3f}, {unseen.mean():.3f}, {unseen.max():.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
