"""Give every site its own number format: least predicted loss within the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcompiler import registry
from qcompiler.budget import Budget, bits_text, kept_sites, parse_budget
from qcompiler.errors import BadOption, SolverUnavailable
from qcompiler.graph.sites import Site, find_sites
from qcompiler.graph.topology import tie_groups
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Activations, Menu, Rows, menu, passed_over, target_for
from qcompiler.passes.plan.conflict import conflict, require_feasible
from qcompiler.passes.plan.decide import SEPARABLE, contenders, judge, reranked, runs, solved
from qcompiler.passes.plan.facts import gap_text, site_table, solution_facts
from qcompiler.passes.plan.ledger import Ledger, assert_within
from qcompiler.passes.plan.losses import METHODS, UNITS, Losses, measured_losses
from qcompiler.passes.plan.measured import Measured, require_clock
from qcompiler.passes.plan.mixed import parse_mixed
from qcompiler.passes.plan.pairs import SECONDS as PAIR_SECONDS
from qcompiler.passes.plan.pairs import Pairs
from qcompiler.passes.plan.path import solved_path
from qcompiler.passes.plan.ties import tied
from qcompiler.passes.plan.variants import Variants, require_known, varied
from qcompiler.pipeline import Pass, PassReport
from qcompiler.plan import Plan
from qcompiler.progress import Progress
from qcompiler.solvers.clock import interrupts_raise
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.program import installed
from qcompiler.target import Backend

_ACTIVATIONS: dict[str, Activations] = {"auto": "auto", "float": "float", "static": "static", "dynamic": "dynamic"}
_TIES = ("target", "none", "inputs", "adds")
_MOST_POINTS = 1000  # of a path; each is a problem to solve
_WIDEST = 8  # bits that targets store


@dataclass(frozen=True)
class Allocate(Pass):
    """Mixed precision by an integer program over measured losses.

    Every option of every site is measured alone, together with how the changes that it makes to the output line up
    with those of other sites (`measure.sensitivity`). A solver picks one option a site for the least predicted loss,
    the best of its answers are run whole, and the one with the least true loss is taken. The plan carries the predicted
    loss, a proven lower bound and the gap.

    Attributes:
        budget: "3.5bits", "120MB", "8ms" (where the target can measure it), "1.2Gbops", or several that hold together.
        target: offers the options.
        bits: widths to consider.
        group_sizes: group sizes to offer beside the target's own.
        activations: "auto" (what is fastest on the target), "float", "static" or "dynamic".
        keep: sites to leave float: globs on their names, or "embeddings". Outside the average of bits.
        ties: which sites share one decision: those that read one value ("inputs"), also those that write the
            operands of one Add ("adds"), "none", or what the target asks for.
        method: "auto", or a solver by name: lagrangian, ilp, quadratic, metropolis, soft-mixture, policy-search.
        loss: where the losses of the options come from: "gram" (each option alone, and how the changes of the
            model's output line up), "ablation" (the same without terms between sites), "pairwise" (CLADO), "fisher",
            "hutchinson", "hessian" (BAQ), "masked" and "masked-output" (OHQ).
        pareto: points of the size-against-loss path to solve for, each with its bound; 0: none.
        rerank: how many of the best answers to run whole (fewer for larger models, and none beyond 33 million weights,
            where terms between sites are left out then); 1, or a solver by name, takes the solver's.
        variants: transforms to offer with narrow formats, site by site: "scaled" (AWQ, where a producer absorbs the
            scales), "lowrank" (two small products beside a product).
        pairs: the width that every matrix in panels has on average, with as many columns at one bit more as at one less
            (SliM-LLM); by an integer program without terms between sites. 0: panels are free.
        mixed_blocks: formats with groups of two widths to offer: "int4to8p10" (10 % of the groups at 8 bits), or a pair
            "int4to8" with several shares, of which equal slope makes one threshold over all groups (FGMP).
        samples: calibration samples to measure with; 0: as many as the time allows.
        seconds: time that measuring may take, variants not counted.
        activation_bits: of dynamic activations (which must be asked for if it isn't 8), 3 to 8.
        activation_clip: share of a row's largest magnitude beyond which dynamic activations are clipped, in (0, 1].
    """

    budget: str | tuple[str, ...] = ("4bits",)
    target: str = "onnx"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    group_sizes: tuple[int, ...] = ()
    activations: str = "auto"
    keep: tuple[str, ...] = ()
    ties: str = "target"
    method: str = "auto"
    loss: str = "gram"
    rerank: int = 8
    pareto: int = 0
    variants: tuple[str, ...] = ()
    pairs: int = 0
    mixed_blocks: tuple[str, ...] = ()
    samples: int = 0
    seconds: float = 240.0
    activation_bits: int = 8
    activation_clip: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", (self.budget,))
        if not self.budgets:
            raise BadOption("no budget is given", "allocate", "write bits per weight (3.5bits) or a size (120MB)")
        for name, known in (("activations", tuple(_ACTIVATIONS)), ("ties", _TIES), ("loss", tuple(METHODS))):
            if getattr(self, name) not in known:
                raise BadOption(f"{name} cannot be '{getattr(self, name)}'", "allocate", f"use {', '.join(known)}")
        self._rows()
        if not self.bits or not all(2 <= width <= _WIDEST for width in self.bits):
            raise BadOption(f"bits cannot be {list(self.bits)}", "allocate", f"give widths from 2 to {_WIDEST}")
        if any(size < 1 for size in self.group_sizes):
            raise BadOption(f"group sizes cannot be {list(self.group_sizes)}", "allocate", "give numbers of columns")
        if self.pareto and not 2 <= self.pareto <= _MOST_POINTS:
            fix = f"give 2 to {_MOST_POINTS} points, or 0 for no path"
            raise BadOption(f"a path of {self.pareto} points cannot be had", "allocate: pareto", fix)
        if self.pairs and (self.pairs < 3 or self.pareto or self.method not in ("auto", "ilp")):
            fix = "give 3 bits or more, no path, and leave the method to auto or ilp"
            raise BadOption(f"pairs of {self.pairs} bits cannot be had here", "allocate", fix)
        if self.samples < 0 or not self.seconds >= 0:  # NaN is neither
            raise BadOption("samples and seconds must be 0 or more", "allocate")
        if self.rerank < 1:
            raise BadOption("rerank must be 1 or more", "allocate", "1 takes the solver's answer")
        if self.method != "auto":
            registry.find("solvers", self.method)
        require_known(self.variants, self.loss, self.budgets)
        if parse_mixed(self.mixed_blocks) and self.pairs:
            raise BadOption("columns in pairs have whole widths", "allocate: mixed_blocks", "drop it, or pairs")

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets, parsed."""
        return tuple(parse_budget(text) for text in self.budget)

    def foresee(self, model: Model) -> None:
        """Refuse a budget in seconds where the target cannot measure them; see that there is a solver."""
        self.requires(model)
        require_clock(target_for(self.target, _ACTIVATIONS[self.activations]), self.budgets)

    def requires(self, model: Model) -> None:
        """Refuse to measure for a solver that is not there."""
        del model
        if installed() is None:
            raise SolverUnavailable("no integer solver is usable (HiGHS, CBC)", "allocate", "pip install highspy")

    @interrupts_raise()
    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.plan`."""
        mode = _ACTIVATIONS[self.activations]
        backend = target_for(self.target, mode)
        sites = find_sites(model.ir)
        kept = kept_sites(sites, self.keep)
        free = [site for site in sites if site.name not in kept]
        mixed = parse_mixed(self.mixed_blocks)
        rows = self._rows() if mode == "dynamic" else None
        menus = [menu(backend, site, self.bits, self.group_sizes, mode, mixed, rows) for site in free]
        ties = self._tie_names(backend, model, free)
        pairs = Pairs.of(model, free, self.pairs)
        menus, groups, refused = tied([pairs.narrowed(m) for m in menus], ties)
        ledger = Ledger.of(model, sites, menus, kept)
        require_feasible(ledger, [budget for budget in self.budgets if budget.stored], groups, pairs)
        menus, variants = varied(model, menus, self.variants, ties, progress)
        ledger = replace(ledger, menus=tuple(m for m in menus if m.plans))
        timing = Measured(model, backend, sites, self.budgets, progress)
        ledger = timing.price(ledger, groups)
        require_feasible(ledger, self.budgets, groups, pairs)
        losses = measured_losses(model, ledger.menus, self.loss, self.samples, self.seconds, progress)
        settled = _settled(variants, ledger, losses, self.budgets, groups)
        ledger, problem, solution, judged = self._decide(model, timing, ledger, groups, settled, pairs)
        decided = {m.site.name: m.plans[int(o)] for m, o in zip(ledger.menus, solution.choice, strict=True)}
        decided = variants.commit(model, decided)
        model.plan = Plan(decided, kept=kept)
        bits, size = assert_within(model, self.budgets)
        believed = replace(problem, cross=None) if solution.method in SEPARABLE else problem
        facts = solution_facts(self.budget, ledger, believed, solution, size)
        facts["loss_units"] = UNITS.get(self.loss)
        if self.pareto and ledger.menus:
            facts["pareto"] = solved_path(ledger, believed, self.pareto, progress)
        model.plan = replace(model.plan, solution=facts)
        progress.note(f"allocate: {bits_text(bits)}, predicted loss {solution.objective:.4g}, {gap_text(solution)}")
        refused += [*(refusal for m in menus for refusal in m.refused), *passed_over(model, sites, progress)]
        table = site_table(ledger, losses, solution)
        metrics = {"bits_per_weight": bits, "stored_bytes": size, "sites": table, "measured": dict(losses.facts)}
        metrics |= {"runs": judged, "latency": timing.facts, "variants": variants.facts(decided)}
        return PassReport("allocate", len(decided), tuple(refused), metrics)

    def _rows(self) -> Rows:
        return Rows.of("allocate", self.activations, self.activation_bits, self.activation_clip)

    def _tie_names(self, backend: Backend, model: Model, sites: Sequence[Site]) -> list[tuple[str, ...]]:
        ties = getattr(backend, "ties", "none") if self.ties == "target" else self.ties
        return [] if ties == "none" else tie_groups(model.ir, sites, add_inputs=ties == "adds")

    def _decide(
        self,
        model: Model,
        timing: Measured,
        ledger: Ledger,
        groups: Sequence[tuple[int, ...]],
        losses: Losses,
        pairs: Pairs,
    ) -> tuple[Ledger, Problem, Solution, dict[str, Any]]:
        """Solve, run the best answers, and keep to the latencies; what was run whole comes last."""
        weights = sum(m.site.count for m in ledger.menus)
        # Terms between sites are believed only if runs confirm what follows from them.
        unseen = self.method == "auto" and self.rerank > 1 and runs(self.rerank, weights) == 1
        cross = None if self.method in SEPARABLE or unseen else losses.cross
        judged: dict[bytes, dict[str, Any]] = {}

        def pose(priced: Ledger) -> Problem:
            return pairs.held(replace(priced.problem(losses.rows, self.budgets, groups), cross=cross), priced.menus)

        def answer(problem: Problem) -> Solution:
            samples = int(losses.facts.get("samples", 0))
            solution, facts = self._rerank(
                model, ledger.menus, problem, self._solve(ledger, problem), samples, timing.progress
            )
            judged[solution.choice.tobytes()] = facts
            return solution

        final, solution = timing.confirm(ledger, answer(pose(ledger)), pose, answer)
        return final, pose(final), solution, judged[solution.choice.tobytes()]

    def _solve(self, ledger: Ledger, problem: Problem) -> Solution:
        try:
            return solved(problem, "ilp", PAIR_SECONDS) if self.pairs else solved(problem, self.method)
        except (InfeasibleProblem, NoChoiceFound) as error:
            raise conflict(ledger, problem, self.budgets, isinstance(error, InfeasibleProblem)) from error
        except ValueError as error:
            raise BadOption(f"method '{self.method}': {error}", "allocate", 'use "auto"') from error

    def _rerank(
        self,
        model: Model,
        menus: Sequence[Menu],
        problem: Problem,
        solution: Solution,
        samples: int,
        progress: Progress,
    ) -> tuple[Solution, dict[str, Any]]:
        """The best answers run whole, on samples that were not measured on if there are some, and the best of them."""
        most = runs(self.rerank, sum(m.site.count for m in menus)) if self.method == "auto" and not self.pairs else 1
        answers = contenders(problem, solution, most) if most > 1 and menus else []
        if len(answers) < 2:
            return solution, {}
        truth, margin = judge(model, menus, samples)
        progress.note(f"running the {len(answers)} best allocations")
        return reranked(truth, margin, answers)


def _settled(
    variants: Variants, ledger: Ledger, losses: Losses, budgets: Sequence[Budget], groups: Sequence[tuple[int, ...]]
) -> Losses:
    """The losses, infinite for options that the sites of a group cannot have together."""
    if not variants.offers or not ledger.menus:
        return losses
    found = variants.settle(ledger.menus, ledger.problem(losses.rows, budgets, groups))
    rows = [[float(v) for v in row[: len(m.plans)]] for m, row in zip(ledger.menus, found, strict=True)]
    return replace(losses, rows=rows)
