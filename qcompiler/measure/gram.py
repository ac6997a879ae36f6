"""Gram matrices of what multiplies a weight: H = E[x x^T], the curvature of a layer's squared output error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.sites import Site
from qcompiler.measure.patches import site_inputs
from qcompiler.measure.stream import activations, measurement_key
from qcompiler.model import Model

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
_TOGETHER = 1 << 29  # bytes of Gram matrices alive at a time, where a walk can be cut into parts
_ROWS = 4096  # of one batch and site; convolutions have hundreds of thousands, which say the same


@dataclass
class Gram:
    """Second moments of the rows x that a weight matrix is multiplied with.

    Attributes:
        matrix: float32 [groups, columns, columns], E[x x^T].
        mean: float64 [groups, columns], E[x].
        count: number of rows seen.
    """

    matrix: Floats
    mean: npt.NDArray[np.float64]
    count: int

    def error(self, change: npt.NDArray[Any]) -> float:
        """E||x (W' - W)^T||^2 for a change of the weight matrix, float [rows, columns]: tr(D H D^T)."""
        split = np.asarray(change, np.float32).reshape(len(self.matrix), -1, change.shape[1])
        return float(np.einsum("grk,grk->", np.matmul(split, self.matrix), split, dtype=np.float64))


def grams(model: Model, sites: Sequence[Site], limit: int | None = None, rows: int = _ROWS) -> dict[str, Gram]:
    """The Gram matrix of each site's input over the calibration data.

    Args:
        model: with calibration data; the result is cached if it has a cache.
        sites: those whose weight is only looked up (Gather) get no entry. A weight with several users gets
            the average over all their rows. Sites that read the same rows share one object.
        limit: samples, all if None.
        rows: at most so many rows of one batch, evenly spread.
    """
    kinds = {site.name: tuple(multiplied(site)) for site in sites}
    shared = {uses: site for site in sites if (uses := kinds[site.name])}
    key = measurement_key(model, "grams", [str(k) for k in shared], limit, rows)
    found: dict[tuple[Rows, ...], Gram] = {}
    stored = model.cache.get(key) if model.cache is not None and key is not None else None
    if stored is not None:
        for i, uses in enumerate(shared):
            matrix = stored[f"{i}.matrix"]
            found[uses] = Gram(matrix, stored[f"{i}.mean"], int(stored[f"{i}.count"]))
    else:
        found = _measure(model, shared, limit, rows)
        if model.cache is not None and key is not None:
            arrays = {f"{i}.{n}": np.asarray(getattr(found[u], n)) for i, u in enumerate(shared) for n in _FIELDS}
            model.cache.put(key, arrays)
    return {name: found[uses] for name, uses in kinds.items() if uses}


_FIELDS = ("matrix", "mean", "count")


@dataclass(frozen=True)
class Rows:
    """What decides which rows a user multiplies: the value it reads and how it reads it."""

    value: str
    reading: str


def multiplied(site: Site) -> dict[Rows, ir.Node]:
    """What the site multiplies, each once, with an operation that does."""
    rows: dict[Rows, ir.Node] = {}
    for user in site.users:
        data = None if user.op_type == "Gather" else user.inputs[0]
        if data is None or data.name is None:
            continue
        if user.op_type in ("Conv", "ConvTranspose"):
            settings = sorted((name, str(a.value)) for name, a in user.attributes.items())
            reading = f"{user.op_type} {site.shape[2:]} {site.groups} {settings}"
        else:
            reading = f"product {site.shape[:-2]} {site.columns}"
        rows.setdefault(Rows(data.name, reading), user)
    return rows


def _measure(
    model: Model, shared: dict[tuple[Rows, ...], Site], limit: int | None, rows: int
) -> dict[tuple[Rows, ...], Gram]:
    by_value: dict[str, list[tuple[tuple[Rows, ...], ir.Node]]] = {}
    for uses, site in shared.items():
        for use, user in multiplied(site).items():
            by_value.setdefault(use.value, []).append((uses, user))
    found: dict[tuple[Rows, ...], Gram] = {}
    for batch in activations(model, by_value, limit):
        for name, array in batch.items():
            for uses, user in by_value[name]:
                x = site_inputs(shared[uses], array, rows, user)
                if x.shape[1]:
                    found[uses] = _add(found.get(uses), x)
    return found


def _add(before: Gram | None, x: Floats) -> Gram:
    """Fold rows [groups, T, columns] into the averages."""
    new = _product(x) / np.float32(x.shape[1])
    mean = x.mean(1, dtype=np.float64)
    if before is None:
        return Gram(new, mean, x.shape[1])
    count = before.count + x.shape[1]
    share = x.shape[1] / count
    before.matrix += (new - before.matrix) * np.float32(share)
    return Gram(before.matrix, before.mean + (mean - before.mean) * share, count)


def _product(x: Floats) -> Floats:
    """X^T X of float32 [groups, T, columns]; BLAS does half the work where it sees one symmetric product."""
    return (x[0].T @ x[0])[None] if len(x) == 1 else np.matmul(x.swapaxes(1, 2), x)


def gram_bytes(sites: Iterable[Site]) -> int:
    """Memory that `grams` of these sites takes."""
    shared = {uses: site for site in sites if (uses := tuple(multiplied(site)))}
    return sum(4 * max(site.groups, prod(site.shape[:-2]), 1) * site.columns**2 for site in shared.values())


def gram_parts(items: Iterable[T], sites: Callable[[T], Sequence[Site]]) -> Iterator[list[T]]:
    """Items in parts whose Gram matrices (of the sites of each) fit into memory together; at least one a part."""
    part: list[T] = []
    for item in items:
        if part and gram_bytes([site for other in (*part, item) for site in sites(other)]) > _TOGETHER:
            yield part
            part = []
        part.append(item)
    if part:
        yield part
