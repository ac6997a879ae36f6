"""Whether a plan stores more than a budget, and what takes the room."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qcompiler.budget import Budget, Row, breakdown
from qcompiler.model import Model

_SHOWN = 3  # parts named
_UNITS = (("MB", 10**6), ("kB", 10**3), ("B", 1))


@dataclass(frozen=True)
class Overrun:
    """A budget that is exceeded.

    Attributes:
        budget: which.
        stored: what is stored, in the budget's unit.
        largest: the parts that take most of it, largest first, with their bytes.
    """

    budget: Budget
    stored: str
    largest: tuple[tuple[str, int], ...]

    def words(self, why: str, fix: str) -> tuple[str, str, str]:
        """What, where and fix of an error.

        Args:
            why: the reason.
            fix: what to do.
        """
        room = ", ".join(f"{name} ({size_text(size)})" for name, size in self.largest)
        what = f"the budget {self.budget} cannot be met: {why}, and stores {self.stored}, most of it in {room}"
        return what, "--budget", fix


def overrun(model: Model, budgets: Iterable[Budget], size: int | None = None) -> Overrun | None:
    """The first budget of what is stored that a model's plan exceeds, if it exceeds one.

    Args:
        model: its graph still float, with its plan.
        budgets: those of seconds and bit operations are passed over.
        size: bytes of everything stored, where the plan alone does not say; by default as the plan says.
    """
    rows = breakdown(model)
    average = [row for row in rows if row.what in ("embedding", "weight")]
    bits, weights = sum(row.bits for row in average), sum(row.weights for row in average)
    for budget in (b for b in budgets if b.stored):
        amount = budget.spent(bits, weights, sum(row.bytes for row in rows) if size is None else size)
        if amount > budget.amount:
            return Overrun(budget, budget.show(amount), _largest(average if budget.kind == "bits" else rows))
    return None


def size_text(count: int) -> str:
    """Bytes for people, in the units of a budget."""
    unit, scale = next((u, s) for u, s in _UNITS if count >= s or s == 1)
    return f"{count / scale:.3g} {unit}"


def _largest(rows: Iterable[Row]) -> tuple[tuple[str, int], ...]:
    found = sorted(((row.site, row.bytes) for row in rows if row.bytes), key=lambda item: -item[1])
    return tuple(found[:_SHOWN])
