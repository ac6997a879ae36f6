"""Allocation by a learned policy that visits the units in order: a reconstruction of RAMP, whose code is not public.

An episode is one pass over the units. The policy sees a unit's features (of activations, weights and structure, if the
caller has them) and the share of the budget that is left, and draws the unit's option. The reward comes at the end
(`reward`): quality first, three times the penalty where the quality is worse than that of the uniform choice, a small
bonus for budget left over where it is not, and a cliff over the budget.

RAMP trains by soft actor-critic, off-policy, with a continuous action that is rounded to a number of bits. Here the
policy is a softmax over the options, linear in the features, trained by the policy gradient (REINFORCE with Adam, the
rewards' ranks in their batch as advantages, an entropy bonus that fades): rewards from tables cost microseconds, so
there is nothing that old episodes need to be kept for, and no critic to train; options need no order. The best episodes
are finished by local search, as what a policy leaves of a budget is seldom nothing.

A separable problem's integer program finds better choices in less time. What the policy adds is that it transfers:
trained on one problem, it allocates another with the same features and options in one pass (`PolicySearch`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.measured import Measured
from qcompiler.solvers.problem import Choice, Floats, Problem, Solution

_CLIFF = -10.0
_WORST = 3.0  # quality is cut here, so that nothing within the budgets is rewarded less than the cliff
_BONUS = 0.02
_BATCH = 64
_RATE = 0.03
_ENTROPY = 0.3
_LOOKS = 16  # times in a training that local search finishes a batch's best episode
_DRAWS = 64  # episodes that `solve` draws besides the likeliest


def solve_policy_search(
    problem: Problem,
    deadline: float = 60.0,
    *,
    features: npt.ArrayLike | None = None,
    episodes: int = 12800,
    seed: int = 0,
) -> Solution:
    """Train a policy on the problem; the best choice of all its episodes.

    Args:
        problem: any, pair terms included.
        deadline: seconds.
        features: float [units, features] of the policy; `default_features` if None.
        episodes: passes over the units to train on.
        seed: of the random numbers; the same seed gives the same answer unless the deadline cuts the training.

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: none was met.
        ValueError: features of the wrong shape or not finite, or no episodes.
    """
    measured = Measured(problem, deadline)
    policy = PolicySearch(seed=seed)
    policy.learn([(measured, features)], episodes)
    policy.draw(measured, features)
    return measured.solution("policy-search")


def reward(loss: float, over: float, spare: float, best: float, uniform: float) -> float:
    """RAMP's reward as reconstructed, for one choice.

    Args:
        loss: of the choice.
        over: by how much it exceeds the budgets, relative to the spread of costs; 0 if it does not.
        spare: share of the budget left over, in 0 to 1.
        best: the loss that counts as perfect quality.
        uniform: the loss of the uniform choice; the unit of quality is uniform - best.
    """
    worse = min(max(loss - best, 0.0) / max(uniform - best, 1e-300), _WORST)
    quality = -worse if loss <= uniform else -3 * worse
    if over > 0:  # what it loses does not count; the cliff slopes towards the budget, or a policy over it stays there
        return _CLIFF * (1 + over)
    return quality + _BONUS * spare if loss <= uniform else quality


def default_features(problem: Problem) -> Floats:
    """What the tables of a problem without ties tell of its units: float64 [units, 4 + options].

    Logarithms of the spread of losses and of costs, relative to the problem's mean, their difference squared; depth;
    the shape of the losses over the options. None depends on the scale of losses or costs.
    """
    allowed = problem.allowed
    low = np.where(allowed, problem.loss, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    above = np.where(allowed, problem.loss - low, 0.0)
    spread = above.max(axis=1, initial=0.0)
    size = np.zeros(problem.units)
    for name in problem.budgets:
        cost = problem.costs[name]
        most, least = (np.where(allowed, cost, fill) for fill in (-np.inf, np.inf))
        extra = most.max(axis=1, initial=-np.inf) - least.min(axis=1, initial=np.inf)
        size += extra / (extra.sum() or 1.0)
    value, price = _centred_logs(spread), _centred_logs(size)
    depth = np.linspace(-1, 1, problem.units)
    shape = np.log10(1e-3 + above / np.where(spread > 0, spread, 1.0)[:, None])
    return np.column_stack([value, price, (value - price) ** 2, depth, np.where(allowed, shape, 0.0)])


class PolicySearch:
    """A policy: trained on one problem, it allocates others with the same number of options and features.

    Args:
        weights: float64 [options, features + 2] of a trained policy, or None for an untrained one. The last two
            features are the share of the budget left (of the tightest resource) and a constant.
        seed: of the random numbers.
    """

    def __init__(self, weights: npt.ArrayLike | None = None, seed: int = 0) -> None:
        self.weights: Floats | None = None if weights is None else np.array(weights, np.float64)
        self._rng = np.random.default_rng(seed)

    def train(
        self,
        problems: Problem | Sequence[Problem],
        deadline: float = 60.0,
        *,
        features: Sequence[npt.ArrayLike] | None = None,
        episodes: int = 12800,
    ) -> None:
        """Improve the policy on one problem, or on several in turn, which makes it transfer better.

        Args:
            problems: what to train on.
            deadline: seconds, in all.
            features: one array for each problem, as in `solve_policy_search`.
            episodes: in all.
        """
        given = [problems] if isinstance(problems, Problem) else list(problems)
        tables = [None] * len(given) if features is None else list(features)
        if not given or len(tables) != len(given):
            raise ValueError(f"{len(given)} problems to train on, {len(tables)} tables of features")
        self.learn([(Measured(p, deadline), t) for p, t in zip(given, tables, strict=True)], episodes)

    def solve(self, problem: Problem, deadline: float = 60.0, *, features: npt.ArrayLike | None = None) -> Solution:
        """Allocate a problem without training on it: the best of the likeliest episode and of a few drawn ones.

        Options that leave no room for the remaining units' cheapest are not drawn. Errors as in
        `solve_policy_search`, and ValueError for a policy that is not trained.
        """
        self._weights()
        measured = Measured(problem, deadline)
        self.draw(measured, features)
        return measured.solution("policy-search")

    def learn(self, lessons: Sequence[tuple[Measured, npt.ArrayLike | None]], episodes: int) -> None:
        """`train` on measured problems with their features; they remember the best episode."""
        if episodes < 1:
            raise ValueError("at least one episode is needed")
        courses = [self._course(measured, features) for measured, features in lessons]
        weights = self._weights()
        first, second = np.zeros_like(weights), np.zeros_like(weights)
        batches = math.ceil(episodes / _BATCH)
        looks = max(1, batches // len(courses) // _LOOKS)
        for batch in range(batches):
            course = courses[batch % len(courses)]
            if course.measured.late:
                break
            choices, trace = course.run(weights, _BATCH, self._rng)
            rewards = np.array([course.rewarded(choice) for choice in choices])
            if batch // len(courses) % looks == 0:
                _finish(course.measured, choices[int(rewards.argmax())])
            slope = trace.slope(_ranked(rewards), _ENTROPY * (1 - batch / batches))
            first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
            unbiased = first / (1 - 0.9 ** (batch + 1))
            weights = weights + _RATE * unbiased / (np.sqrt(second / (1 - 0.99 ** (batch + 1))) + 1e-12)
        self.weights = weights

    def _weights(self) -> Floats:
        if self.weights is None:
            raise ValueError("train the policy first, or give it weights")
        return self.weights

    def draw(self, measured: Measured, features: npt.ArrayLike | None) -> None:
        """`solve` on a measured problem, which remembers the best episode."""
        course, weights = self._course(measured, features), self._weights()
        likeliest, _ = course.run(weights, 1, None, within=True)
        drawn, _ = course.run(weights, _DRAWS, self._rng, within=True)
        for choice in [*likeliest, *drawn]:
            feasible = measured.repair(choice)
            if feasible is not None:
                measured.offer(feasible)
        if measured.best is not None:
            _finish(measured, measured.best)

    def _course(self, measured: Measured, features: npt.ArrayLike | None) -> _Course:
        """The problem with its features, checked; weights of zeros if there are none yet."""
        problem = measured.problem
        if features is None:
            table = default_features(problem)
        else:
            given = np.asarray(features, np.float64)
            if given.ndim != 2 or len(given) != measured.original.units or not np.isfinite(given).all():
                raise ValueError(f"features must be finite and [{measured.original.units}, features]: {given.shape}")
            count = np.bincount(measured.members, minlength=problem.units)[:, None]
            table = np.zeros((problem.units, given.shape[1]))
            np.add.at(table, measured.members, given)
            table /= np.maximum(count, 1)
        shape = (problem.loss.shape[1], table.shape[1] + 2)
        if self.weights is None:
            self.weights = np.zeros(shape)
        if self.weights.shape != shape:
            raise ValueError(
                f"the policy is for [options, features + 2] = {self.weights.shape}, the problem is {shape}"
            )
        return _Course(measured, table)


def _finish(measured: Measured, choice: Choice) -> None:
    """Repair and improve one episode by local search: it counts as found, but is not learned from."""
    feasible = measured.repair(choice)
    if feasible is not None:
        measured.offer(measured.improved(feasible))


def _ranked(rewards: Floats) -> Floats:
    """Ranks from -1 to 1, equal ones for equal rewards: the baseline is the batch's median, and no cliff drowns it."""
    order = np.sort(rewards)
    ranks = np.searchsorted(order, rewards, side="left") + np.searchsorted(order, rewards, side="right") - 1
    return ranks / max(len(rewards) - 1, 1) - 1.0


class _Trace:
    """What the policy saw, thought and did: features, chances less what was drawn, chances; [units, batch, ...]."""

    def __init__(self, seen: Floats, surprise: Floats, chances: Floats) -> None:
        self.seen, self.surprise, self.chances = seen, surprise, chances

    def slope(self, advantage: Floats, entropy: float) -> Floats:
        """Derivative of the expected advantage plus `entropy` times the mean entropy, by the weights."""
        logs = np.log(np.maximum(self.chances, 1e-30))
        spread = -self.chances * (logs - (self.chances * logs).sum(axis=2, keepdims=True))
        total = self.surprise * advantage[:, None] + entropy * spread
        return np.einsum("ubo,ubf->of", total, self.seen) / len(advantage)


class _Course:
    """Passes over a problem's units, many at once."""

    def __init__(self, measured: Measured, features: Floats) -> None:
        self.measured, self.features, self.problem = measured, features, measured.problem
        estimate = measured.estimate
        allowed = self.problem.allowed
        costs = np.array([estimate.costs[name] for name in measured.names]).reshape(len(measured.names), *allowed.shape)
        least = np.where(allowed, costs, np.inf).min(axis=2, initial=np.inf)
        self.extra = np.where(allowed, costs - least[:, :, None], 0.0)  # [resources, units, options]
        self.room = measured.budget - least.sum(axis=1)
        most = self.extra.max(axis=2, initial=0.0)
        self.remaining = np.cumsum(most[:, ::-1], axis=1)[:, ::-1]  # what the units from here on can use

        start = measured.start()
        self.uniform = measured.offer(start)[0]
        self.best = float(estimate.loss.min(axis=1, initial=np.inf).sum())

    def rewarded(self, choice: Choice) -> float:
        """The reward of one episode, which `measured` remembers if it is the best."""
        loss, over, spare = self.measured.offer(choice)
        return reward(loss, over, min(max(spare, 0.0), 1.0), self.best, self.uniform)

    def run(
        self, weights: Floats, batch: int, rng: np.random.Generator | None, within: bool = False
    ) -> tuple[npt.NDArray[np.intp], _Trace]:
        """Choices [batch, units] and their trace; the likeliest options without `rng`; `within` the budgets or not."""
        units, options = self.problem.loss.shape
        allowed = self.problem.allowed
        choices = np.zeros((batch, units), np.intp)
        left = np.repeat(self.room[None], batch, axis=0)
        seen = np.ones((units, batch, weights.shape[1]))
        chances, surprise = np.zeros((units, batch, options)), np.zeros((units, batch, options))
        rows = np.arange(batch)
        for u in range(units):
            seen[u, :, :-2] = self.features[u]
            seen[u, :, -2] = self._share(left, u)
            usable = np.repeat(allowed[u][None], batch, axis=0)
            if within:
                fits = usable & (self.extra[:, u].T[None] <= left[:, None, :] + 1e-12 * np.abs(self.room)).all(axis=2)
                usable = np.where(fits.any(axis=1, keepdims=True), fits, usable)
            logits = np.where(usable, seen[u] @ weights.T, -np.inf)
            grown = np.exp(logits - logits.max(axis=1, keepdims=True))
            chances[u] = grown / grown.sum(axis=1, keepdims=True)
            choices[:, u] = (logits if rng is None else logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
            surprise[u] = -chances[u]
            surprise[u, rows, choices[:, u]] += 1.0
            left -= self.extra[:, u, choices[:, u]].T
        return choices, _Trace(seen, surprise, chances)

    def _share(self, left: Floats, u: int) -> Floats:
        """Share of what the remaining units can use that is left, of the tightest resource: [batch], in -1 to 1."""
        usable = self.remaining[:, u]
        share = left[:, usable > 0] / usable[usable > 0]
        return np.clip(share.min(axis=1, initial=1.0), -1, 1)


def _centred_logs(values: Floats) -> Floats:
    """log10, 0 in the mean of the positive ones; -3 where not positive."""
    positive = values > 0
    logs = np.log10(values, where=positive, out=np.zeros(len(values)))
    return np.where(positive, logs - (logs[positive].mean() if positive.any() else 0.0), -3.0)
