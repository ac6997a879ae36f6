"""The error that rounding makes in the output of a product, on some rows of its input, activations rounded too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from qcompiler.formats.base import Floats
from qcompiler.graph.rows import rounded
from qcompiler.measure.patches import site_inputs
from qcompiler.measure.stream import activations
from qcompiler.model import Model
from qcompiler.passes.transform.branching import Readers
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress

T = TypeVar("T")
Doubles = npt.NDArray[np.float64]
ROWS = 384  # of an input: enough to compare weights that were not fitted to them
_TOGETHER = 1 << 27  # bytes of rows alive at a time


@dataclass(frozen=True, eq=False)
class RowError:
    """||x R^T - Q(x) Q(R)^T||^2 over rows x: what is left of a product beside an exact branch.

    Attributes:
        exact: float32 [rows, columns].
        seen: the same as the operation gets them, perhaps rounded.
    """

    exact: Floats
    seen: Floats

    @staticmethod
    def of(rows: Floats, plan: SitePlan) -> RowError:
        """By rows of the input; dynamic activations are rounded as the plan says, all others taken as they are."""
        if plan.activation != "dynamic":
            return RowError(rows, rows)
        return RowError(rows, rounded(rows, plan.activation_bits, plan.activation_clip))

    def __call__(self, rest: Floats, after: Floats) -> float:
        """For R and Q(R), float32 [outputs, columns]."""
        if self.seen is self.exact:
            error = self.exact @ (rest - after).T
        else:
            error = self.exact @ rest.T - self.seen @ after.T
        return float(np.einsum("tr,tr->", error, error, dtype=np.float64))


def with_rows(
    model: Model, items: Sequence[T], groups: Callable[[T], Sequence[Readers]], progress: Progress, what: str
) -> Iterator[tuple[T, list[tuple[Readers, Floats]]]]:
    """Each item with its groups and rows of their inputs, float32 [at most ROWS, columns], drawn from calibration data.

    The graph may change between two items, if the inputs of later ones stay. Inputs without rows are left out.

    Args:
        model: with calibration data.
        items: in this order.
        groups: of an item.
        progress: shows how far.
        what: is being done with them.
    """
    parts: list[list[T]] = [[]]
    for item in items:
        columns = sum(group.columns for one in (*parts[-1], item) for group in groups(one))
        if parts[-1] and 4 * ROWS * columns > _TOGETHER:
            parts.append([])
        parts[-1].append(item)
    for part in parts:
        found = _measured(model, [group for item in part for group in groups(item)])
        for item in progress.track(part, what):
            yield item, [(group, found[group]) for group in groups(item) if group in found]


def _measured(model: Model, groups: Sequence[Readers]) -> dict[Readers, Floats]:
    rng = np.random.default_rng(0)
    found: dict[Readers, tuple[Floats, Doubles]] = {}
    by_name: dict[str, list[Readers]] = {}
    for group in groups:
        by_name.setdefault(group.name, []).append(group)
    for batch in activations(model, by_name, enough_samples(model)):
        for name, array in batch.items():
            for group in by_name[name]:
                rows = site_inputs(group.sites[0], array)[0]
                found[group] = _drawn(found.get(group), rows, rng.random(len(rows)))
    return {group: rows for group, (rows, _) in found.items() if len(rows)}


def _drawn(before: tuple[Floats, Doubles] | None, rows: Floats, ranks: Doubles) -> tuple[Floats, Doubles]:
    """The rows with the lowest random ranks of all that came so far: each is as likely to be among them."""
    if before is not None:
        rows, ranks = np.concatenate([before[0], rows]), np.concatenate([before[1], ranks])
    kept = np.sort(np.argsort(ranks)[:ROWS])
    return rows[kept], ranks[kept]
