"""A lower bound for quadratic problems without any integer program: a convex form, and the best of such forms.

At one-hot x a diagonal can be moved between the quadratic and the linear part (x_k^2 = x_k), and terms within a unit
are free (x_b x_c = 0). So for any symmetric blocks W_u, one a unit,

    loss(x) = sum_k (unary_k - W_kk / 2) x_k + x' (G + W) x / 2     exactly.

If G + W is positive semidefinite this is convex; its minimum over the convex hull of one-hot choices within the budgets
is a bound, and the dual gap of Frank-Wolfe proves one at every step. The bound is concave in W, so the best W is found
by Frank-Wolfe too (the relaxation's semidefinite dual): at the minimiser x the bound rises most towards the W that
minimises sum_u <W_u, diag(x_u) - x_u x_u'> over G + W >= 0, whose dual, with blocks of a low-rank factor, is solved by
coordinate descent (the mixing method, Wang and Kolter 2017, with blocks for units).

This is convex quadratic reformulation (Billionnet, Elloumi, Plateau 2009) with first-order methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from qcompiler.solvers import clock
from qcompiler.solvers.pairs import PairProblem, Terms
from qcompiler.solvers.problem import Choice, Floats

_FILL = 0.95  # correlation of one unit's errors at two options, to start from
_EXACT, _SHARE = 2e-5, 0.04  # of the loss, of the gap to the known choice: where Frank-Wolfe stops
_PATIENCE = 100  # steps of Frank-Wolfe in which the bound must rise by as much
_BLUR = 0.02  # of the uniform distribution in x, so that its covariance has full rank


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What a convex form proves.

    Attributes:
        bound: no choice within the budgets has a loss below this.
        point: float64 [units, options], the minimiser of the convex form: shares of the options.
        prices: float64 [resources].
        marginals: float64 [units, options]: a choice that takes this option loses at least this much.
    """

    bound: float
    point: Floats
    prices: Floats
    marginals: Floats

    @property
    def rounded(self) -> Choice:
        """Every unit's option with the largest share; may exceed the budgets."""
        return self.point.argmax(axis=1)


class ConvexBound:
    """Bounds of one problem, better and better.

    Args:
        problem: budgets with pair costs count by their price, which stays as it is.
        prices: float64 [resources] to start from.
        deadline: on the clock of `time.monotonic`.
    """

    def __init__(self, problem: PairProblem, prices: Floats, deadline: float) -> None:
        self.problem, self.deadline = problem, deadline
        self._paired = np.array([t.pair is not None for t in problem.resources], bool)
        fixed = np.where(self._paired, prices, 0.0)
        terms: Terms = problem.priced(fixed)
        self._own = terms.unary
        self._spent = float(fixed @ problem.budgets)
        self._prices = prices.copy()
        units, options = problem.allowed.shape
        loss = np.where(problem.allowed, self._own, 0)
        spread = loss - np.where(problem.allowed, self._own, np.inf).min(axis=1, keepdims=True) * problem.allowed
        scale = np.sqrt(np.maximum(2 * np.abs(loss), spread))
        self._scale = np.maximum(scale, 1e-5 * scale.max(initial=0.0) + 1e-150)
        flat = self._scale.ravel()
        pair = np.zeros((units * options, units * options)) if terms.pair is None else terms.pair.reshape(flat.size, -1)
        self._cross = pair / flat[:, None] / flat
        self.best: Relaxation | None = None
        self._enough = np.inf

    def run(self, enough: float = np.inf, rounds: int = 40) -> Relaxation:
        """Improve the form until the bound stalls, reaches `enough`, or time is up."""
        units, options = self.problem.allowed.shape
        blocks = np.full((units, options, options), _FILL)
        if self.problem.within is not None:
            blocks = self.problem.within / (self._scale[:, :, None] * self._scale[:, None, :])
        blocks[:, np.arange(options), np.arange(options)] = 1.0
        self._enough = enough
        found = self._judge(blocks, None)
        self.best, step = found, 1.0
        factor: Floats | None = None
        for _ in range(rounds):
            if self.best.bound >= enough or clock.now() > self.deadline:
                break
            target, factor = self._better_blocks(found.point, factor)
            gain = None
            for _ in range(4):
                tried = blocks + step * (target - blocks)
                better = self._judge(tried, found.point)
                if better.bound > self.best.bound or clock.now() > self.deadline:
                    gain = better.bound - self.best.bound
                    break
                step /= 2
            else:
                break
            if gain <= 0:
                break
            blocks, found = tried, better
            if gain <= 1e-4 * abs(self.best.bound):
                self.best = better
                break
            self.best, step = better, min(1.0, 1.5 * step)
        return self.best

    def _form(self, blocks: Floats) -> tuple[Floats, Floats]:
        """Linear part [units, options] and matrix of the form, made convex by the smallest shift of the diagonal."""
        units, options = self.problem.allowed.shape
        matrix = self._cross.copy()
        index = np.arange(units)
        matrix.reshape(units, options, units, options)[index, :, index, :] = blocks
        diagonal = np.arange(len(matrix))
        shift = max(0.0, -float(np.linalg.eigvalsh(matrix)[0]) + 1e-9)
        matrix[diagonal, diagonal] += shift
        flat = self._scale.ravel()
        linear = self._own - 0.5 * (matrix[diagonal, diagonal] * flat**2).reshape(units, options)
        matrix *= flat[:, None]
        matrix *= flat
        return linear, matrix

    def _judge(self, blocks: Floats, start: Floats | None) -> Relaxation:
        """The bound of one form, by Frank-Wolfe."""
        linear, matrix = self._form(blocks)
        finite = np.where(self.problem.allowed, linear, 0)
        x = self._least(linear)[0] if start is None else start
        product = matrix @ x.ravel()
        best, before, prices, priced = -np.inf, -np.inf, self._prices, linear
        size = 0.01 * float(np.abs(finite).max(axis=1, initial=0).sum())  # where terms cancel, the loss says little
        for number in range(4000):
            slopes = linear + product.reshape(x.shape)
            corner, now, least = self._least(slopes)
            here = float((np.where(self.problem.allowed, slopes, 0) * x).sum())
            value = float((finite * x).sum() + 0.5 * x.ravel() @ product)
            proven = value - here + least
            if proven > best:
                best, prices = proven, now
                priced = slopes + sum(p * t.unary for p, t in zip(now, self.problem.resources, strict=True))
            left = self._enough - best  # what there is to gain at all: no use in proving this form to its last digit
            near = max(_EXACT * max(abs(value), size), _SHARE * left if np.isfinite(left) else 0.0)
            if number % _PATIENCE == _PATIENCE - 1:
                if best - before <= near:
                    break
                before = best
            if value - best <= near or (number % 16 == 0 and clock.now() > self.deadline):
                break
            along = (corner - x).ravel()
            bent = matrix @ along
            curvature, slope = float(along @ bent), float(np.where(self.problem.allowed, slopes, 0).ravel() @ along)
            step = 1.0 if curvature <= 0 else min(1.0, -slope / curvature)
            if step <= 0:
                break
            x, product = x + step * along.reshape(x.shape), product + step * bent
        self._prices = np.where(self._paired, self._prices, prices)
        rounding = 1e-12 * float(np.abs(finite).max(axis=1, initial=0).sum() + np.abs(product @ x.ravel()))
        proven = best - self._spent - rounding
        marginals = proven + priced - priced.min(axis=1, keepdims=True)
        return Relaxation(proven, x, self._prices.copy(), marginals)

    def _least(self, slopes: Floats) -> tuple[Floats, Floats, float]:
        """Minimise a linear function over shares within the budgets: (point, prices, a lower bound of the minimum)."""
        rows = [t.unary for t, paired in zip(self.problem.resources, self._paired, strict=True) if not paired]
        budgets = self.problem.budgets[~self._paired]
        prices = np.zeros(len(self._paired))
        if len(rows) > 1:
            point, found = _least_of_many(slopes, self.problem.allowed, rows, budgets)
        else:
            point, found = _least_of_one(slopes, rows[0] if rows else None, budgets)
        prices[~self._paired] = found
        total = slopes + sum((p * row for p, row in zip(found, rows, strict=True)), np.zeros_like(slopes))
        return point, prices, float(total.min(axis=1).sum() - found @ budgets)

    def _better_blocks(self, point: Floats, factor: Floats | None) -> tuple[Floats, Floats]:
        """The blocks W that minimise sum <W_u, covariance of x_u> with cross + W >= 0, by their dual."""
        units, options = point.shape
        shares = (1 - _BLUR) * point + _BLUR * self.problem.allowed / self.problem.allowed.sum(axis=1, keepdims=True)
        spread = shares[:, :, None] * np.eye(options) - shares[:, :, None] * shares[:, None, :]
        scaled = spread * self._scale[:, :, None] * self._scale[:, None, :]
        values, vectors = np.linalg.eigh(scaled)
        values = np.maximum(values, 1e-9 * (self._scale**2).max(axis=1, keepdims=True))
        root = (vectors * np.sqrt(values)[:, None, :]) @ vectors.transpose(0, 2, 1)
        rank = min(units * options, int(np.sqrt(2 * units * options)) + options + 1)
        if factor is None:
            factor = np.random.default_rng(0).normal(size=(units, options, rank))
        v = root @ _orthonormal(root @ factor)
        field = self._cross @ v.reshape(units * options, rank)
        view = field.reshape(units, options, rank)
        last = np.inf
        for _ in range(60):
            for u in range(units):
                new = -root[u] @ _orthonormal(root[u] @ view[u])
                own = slice(u * options, (u + 1) * options)
                field += self._cross[:, own] @ (new - v[u])
                v[u] = new
            total = float((view * v).sum())
            if clock.now() > self.deadline or last - total <= 1e-5 * abs(total):
                break
            last = total
        # Stationarity says (cross + W) v = 0: W_u = -field_u v_u' (v_u v_u')^-1, symmetric up to convergence.
        inverse = (vectors / values[:, None, :]) @ vectors.transpose(0, 2, 1)
        blocks = -(view @ v.transpose(0, 2, 1)) @ inverse
        return 0.5 * (blocks + blocks.transpose(0, 2, 1)), v


def _orthonormal(matrix: Floats) -> Floats:
    """The nearest matrix with orthonormal rows."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _least_of_one(slopes: Floats, row: Floats | None, budgets: Floats) -> tuple[Floats, Floats]:
    """Exact with one budget: two corners at the price where the cheaper of them fits."""
    index = np.arange(len(slopes))
    point = np.zeros_like(slopes)
    free = slopes.argmin(axis=1)
    if row is None or row[index, free].sum() <= budgets[0]:
        point[index, free] = 1
        return point, np.zeros(len(budgets))
    low, high = 0.0, 1.0
    while row[index, (slopes + high * row).argmin(axis=1)].sum() > budgets[0] and high < 1e300:
        low, high = high, 8 * high
    for _ in range(60):
        middle = (low + high) / 2
        if row[index, (slopes + middle * row).argmin(axis=1)].sum() > budgets[0]:
            low = middle
        else:
            high = middle
    over, under = (slopes + low * row).argmin(axis=1), (slopes + high * row).argmin(axis=1)
    most, least = row[index, over].sum(), row[index, under].sum()
    share = (budgets[0] - least) / (most - least) if most > least else 0.0
    point[index, under] += 1 - share
    point[index, over] += share
    return point, np.array([high])


def _least_of_many(slopes: Floats, allowed: np.ndarray, rows: list[Floats], budgets: Floats) -> tuple[Floats, Floats]:
    """By a linear program; prices of zero, which prove less, if it has trouble."""
    units, options = np.nonzero(allowed)
    one_each = np.zeros((len(allowed), len(units)))
    one_each[units, np.arange(len(units))] = 1
    scale = float(np.abs(slopes[allowed]).max()) or 1.0
    result = linprog(
        slopes[allowed] / scale, A_ub=np.stack([row[allowed] for row in rows]), b_ub=budgets, A_eq=one_each,
        b_eq=np.ones(len(allowed)), method="highs",
    )  # fmt: skip
    point = np.zeros_like(slopes)
    if result.status != 0:
        point[np.arange(len(slopes)), slopes.argmin(axis=1)] = 1
        return point, np.zeros(len(budgets))
    point[units, options] = np.clip(result.x, 0, 1)
    return point, np.maximum(-np.asarray(result.ineqlin.marginals), 0) * scale
