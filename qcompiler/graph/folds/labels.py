"""Channel labels: which entries of which tensors must be transformed alike.

A *label array* has one axis for each axis of a tensor; its length is 1 where the transform does not depend on
that axis, else the full length. Entries are numbers of classes that grow together (union-find) as rules find
that two channels must be scaled by the same number, and that are *pinned* where nothing may be changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import DisjointSet

Labels = npt.NDArray[np.int64]
Dim = int | str | None  # known, symbolic or unknown
Dims = tuple[Dim, ...]


class Unfit(Exception):
    """Labels that cannot follow an operation; the message is the reason."""


class Classes:
    """Union-find over labels, with pins."""

    def __init__(self) -> None:
        self._sets = DisjointSet()
        self._count = 0
        self._pins: list[tuple[int, str]] = []

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New labels, all different."""
        labels = np.arange(self._count, self._count + prod(shape), dtype=np.int64).reshape(shape)
        for label in labels.flat:
            self._sets.add(int(label))
        self._count += labels.size
        return labels

    def tie(self, a: Labels, b: Labels) -> None:
        """Entries of `a` and `b` (broadcast) belong together."""
        a, b = np.broadcast_arrays(a, b)
        for x, y in np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0):
            self._sets.merge(int(x), int(y))

    def pin(self, labels: Labels, reason: str) -> None:
        """The channels of these labels may not be changed."""
        self._pins += [(int(label), reason) for label in np.unique(labels)]

    def roots(self, labels: Labels) -> Labels:
        """A representative for every label: equal where tied."""
        unique, inverse = np.unique(labels, return_inverse=True)
        found = np.array([int(self._sets[int(label)]) for label in unique], np.int64)
        return found[inverse].reshape(labels.shape)

    def pinned(self) -> dict[int, str]:
        """Representatives of the pinned classes, each with the first reason."""
        found: dict[int, str] = {}
        for label, reason in self._pins:
            found.setdefault(int(self._sets[label]), reason)
        return found

    def fit(self, labels: Labels, dims: Dims) -> Labels:
        """Labels for a tensor of other rank or broadcast axes, aligned at the last axis.

        Where the tensor has no axis, or one of length 1, the labels along it are tied.
        """
        extra = labels.ndim - len(dims)
        if extra > 0:
            labels = self._tie_along(labels, tuple(range(extra)))
            labels = labels.reshape(labels.shape[extra:])
        elif extra < 0:
            labels = labels.reshape((1,) * -extra + labels.shape)
        return self._tie_along(labels, tuple(k for k, dim in enumerate(dims) if dim == 1))

    def only(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """Labels that depend on these axes only; what differs along others is tied."""
        kept = {axis % labels.ndim for axis in axes}
        return self._tie_along(labels, tuple(k for k in range(labels.ndim) if k not in kept))

    def _tie_along(self, labels: Labels, axes: tuple[int, ...]) -> Labels:
        long = tuple(k for k in axes if labels.shape[k] > 1)
        if not long:
            return labels
        first = labels[tuple(slice(0, 1) if k in long else slice(None) for k in range(labels.ndim))]
        self.tie(labels, first)
        return first


def reshape(labels: Labels, before: Dims, after: Dims) -> Labels:
    """Carry labels through a Reshape.

    Axes are matched in groups of equal products from the left and from the right; what remains in the middle
    (unknown lengths) may not carry labels.

    Raises:
        Unfit: labels on axes that cannot be matched.
    """
    groups, (i, j), (m, n) = _match(before, after)
    shape: list[int] = []
    position = 0
    pieces: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for left, right in [*groups[0], (range(i, m), range(j, n)), *groups[1]]:
        pieces.append((tuple(left), tuple(right)))
    full = list(labels.shape)
    for left, right in pieces:
        assert not left or left[0] == position
        position += len(left)
        if all(labels.shape[k] == 1 for k in left):
            shape += [1] * len(right)
            continue
        inner, outer = [before[k] for k in left], [after[k] for k in right]
        sizes = [d for d in (*inner, *outer) if isinstance(d, int)]
        if len(sizes) != len(inner) + len(outer) or prod(sizes[: len(inner)]) != prod(sizes[len(inner) :]):
            if len(left) == len(right) == 1:  # one axis stays one axis, whatever it is called
                shape.append(labels.shape[left[0]])
                continue
            raise Unfit("it mixes channels with axes of unknown length")
        for k in left:
            full[k] = int(before[k] or 1)
        shape += sizes[len(inner) :]
    return np.broadcast_to(labels, full).reshape(shape)


_Groups = list[tuple[range, range]]


def _match(before: Dims, after: Dims) -> tuple[tuple[_Groups, _Groups], tuple[int, int], tuple[int, int]]:
    left = _scan(before, after)
    i, j = (left[-1][0].stop, left[-1][1].stop) if left else (0, 0)
    back = _scan(before[i:][::-1], after[j:][::-1])
    m, n = len(before), len(after)
    right = [(range(m - a.stop, m - a.start), range(n - b.stop, n - b.start)) for a, b in reversed(back)]
    if right:
        m, n = right[0][0].start, right[0][1].start
    return (left, right), (i, j), (m, n)


def _scan(before: Dims, after: Dims) -> _Groups:
    """Groups of axes with equal products, from the left, as far as lengths are known."""
    groups: _Groups = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] is not None and before[i] == after[j]:
            groups.append((range(i, i + 1), range(j, j + 1)))
            i, j = i + 1, j + 1
            continue
        k, m, a, b = i, j, 1, 1
        while a != b or k == i or m == j:
            take_before = k == i or (m > j and a < b)
            dims, place = (before, k) if take_before else (after, m)
            dim = dims[place] if place < len(dims) else None
            if not isinstance(dim, int):
                return groups
            if take_before:
                k, a = k + 1, a * dim
            else:
                m, b = m + 1, b * dim
        groups.append((range(i, k), range(j, m)))
        i, j = k, m
    return groups
