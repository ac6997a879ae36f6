"""Find where a transform of one value can be absorbed, and absorb it. The only place that changes weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import apply, blocks
from qcompiler.graph.folds.labels import Labels, Unfit
from qcompiler.graph.folds.region import DOMAINS, Edit, Kind, Region, Undecided, dims, label, refuse, resolve
from qcompiler.graph.folds.rules import POSITIVE, RULES

Floats = npt.NDArray[np.float64]
ORTHOGONAL = 1e-6  # largest error of matrices that are taken as such
_CHOICES = 6  # products of two values in one region: more are not worth the search


@dataclass(frozen=True, eq=False)
class Fold:
    """A value whose channels can be transformed without changing the function of the graph.

    Everything that produces the value absorbs the transform and everything that consumes it the inverse. A
    fold is used once: the graph is different afterwards, so find it again.

    Attributes:
        model: whose graph is changed.
        value: the value, for instance the output of a norm.
        axis: its channel axis.
        kind: "scale", "shift", "permute" or "rotate".
        ties: int64 [channels]: channels with equal numbers must be transformed alike; -1: not at all.
        writers: constants of the producers (gains, rows of weights, biases).
        readers: constants of the consumers (columns of weights).
        region: everything that is touched.
        blocks: of a "rotate": int64 [times, size] each, the channels that one orthogonal matrix may mix. A block is
            there several times where heads of values serve several heads of queries.
    """

    model: ir.Model
    value: ir.Value
    axis: int
    kind: Kind
    ties: Labels
    writers: tuple[Edit, ...]
    readers: tuple[Edit, ...]
    region: Region
    start: Labels
    blocks: tuple[Labels, ...] = ()

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.ties)

    @property
    def free(self) -> npt.NDArray[np.bool_]:
        """[channels]: which may be transformed at all."""
        return self.ties >= 0

    def tied(self, s: npt.ArrayLike, how: Callable[[Floats], float] | None = None, fixed: float = 1.0) -> Floats:
        """The numbers nearest to `s` that respect the ties.

        Args:
            s: [channels].
            how: joins the numbers of tied channels; the geometric mean if None (a scale has no zero).
            fixed: for channels that cannot be transformed: 1 for a scale, 0 for a shift.
        """
        result = np.array(np.broadcast_to(np.asarray(s, np.float64), (self.size,)))
        join = how or (lambda group: float(np.exp(np.log(group).mean())))
        for tie in np.unique(self.ties):
            members = self.ties == tie
            result[members] = fixed if tie < 0 else join(result[members])
        return result

    def absmax(self, edits: Sequence[Edit]) -> Floats:
        """[channels]: the largest |weight| that belongs to a channel, over the matrices among `edits`."""
        return apply.absmax(self.region.classes, self.start, [e for e in edits if e.is_weight])

    def factors(self, s: npt.ArrayLike, constant: ir.Value) -> Floats:
        """What `scale(s)` would multiply a constant by, broadcastable to it; nothing is changed."""
        return apply.multipliers(self.region, self.start, self._checked(s, 1.0), constant)

    def places(self, labels: Labels) -> Labels:
        """Which of the numbers in `ties` each entry of labels of the region takes part in; -1: none.

        So what `scale` does to a constant or a value can be written with one number a tie: learned scales are.
        """
        classes = self.region.classes
        ties = dict(zip(classes.roots(self.start).reshape(-1).tolist(), self.ties.tolist(), strict=True))
        unique, inverse = np.unique(classes.roots(labels), return_inverse=True)
        return np.array([ties.get(int(root), -1) for root in unique], np.int64)[inverse].reshape(labels.shape)

    def scale(self, s: npt.ArrayLike) -> None:
        """Divide channel c of the value by s[c]; its consumers multiply.

        Raises:
            BadOption: s has a zero or infinity, breaks a tie, scales what is fixed, or is negative where a Relu
                or another operation for which that matters is crossed.
            PassRefused: a weight would overflow its element type; nothing is changed.
        """
        self._require("scale")
        numbers = self._checked(s, 1.0)
        if not (np.all(np.isfinite(numbers)) and np.all(numbers > 0 if self.region.positive else numbers != 0)):
            raise BadOption("a scale must be positive and finite here", self.value.name or "")
        apply.scale(self.model, self.region, self.start, numbers)

    def shift(self, d: npt.ArrayLike) -> None:
        """Subtract d[c] from channel c of the value; the biases of its consumers make up for it."""
        self._require("shift")
        apply.shift(self.model, self.region, self.start, self._checked(d, 0.0))

    def permute(self, order: npt.ArrayLike) -> None:
        """Channel c of the value becomes what channel order[c] was.

        Raises:
            BadOption: not a permutation, or it moves a channel that is fixed or out of its head or group.
        """
        self._require("permute")
        places = np.asarray(order, np.int64)
        if sorted(places.tolist()) != list(range(self.size)):
            raise BadOption("not a permutation of the channels", self.value.name or "")
        apply.permute(self.model, self.region, self.start, self.ties, places)

    def rotate(self, matrices: Sequence[npt.ArrayLike]) -> None:
        """Multiply the channels of every block by its matrix from the right.

        Args:
            matrices: orthogonal, [size, size], one for each of `blocks`.

        Raises:
            BadOption: other numbers or sizes, or a matrix isn't orthogonal.
            PassRefused: a weight would overflow its element type; nothing is changed.
        """
        self._require("rotate")
        given = [np.asarray(matrix, np.float64) for matrix in matrices]
        shapes = [(block.shape[1],) * 2 for block in self.blocks]
        if [matrix.shape for matrix in given] != shapes:
            raise BadOption(f"the blocks take matrices of {shapes}", self.value.name or "")
        if any(np.abs(matrix.T @ matrix - np.eye(len(matrix))).max() > ORTHOGONAL for matrix in given):
            raise BadOption("a matrix is not orthogonal", self.value.name or "")
        blocks.rotate(self.model, self.region, self.start, self.blocks, given)

    def _require(self, kind: Kind) -> None:
        if self.kind != kind:
            raise BadOption(f"this fold was found for a {self.kind}", self.value.name or "", "find it again")

    def _checked(self, s: npt.ArrayLike, fixed: float) -> Floats:
        numbers = np.array(np.broadcast_to(np.asarray(s, np.float64), (self.size,)))
        if not np.array_equal(numbers, self.tied(numbers, lambda group: float(group[0]), fixed)):
            raise BadOption("tied channels differ, or a fixed channel changes", self.value.name or "", "use tied()")
        return numbers


def find_fold(
    model: ir.Model,
    value: ir.Value,
    kind: Kind = "scale",
    *,
    axis: int = -1,
    insert: bool = False,
    loose: bool = False,
) -> Fold | Refusal:
    """Find out whether the channels of a value can be transformed, what absorbs it, and which are tied.

    Source: the fold algebra of SmoothQuant (2211.10438), AWQ (2306.00978) and data-free quantization
    (1906.04721), generalised: labels are carried from value to value by one rule an operation.

    Args:
        model: float, with shapes inferred.
        value: of its main graph.
        kind: of transform.
        axis: the channel axis of the value: 1 for images, -1 for rows of features.
        insert: allow operations to be added (per-channel bounds for a Clip that a scale crosses).
        loose: let a scale cross Clip and leave the bounds alone, and a shift cross Relu; the function changes unless
            the scaled values stay within the bounds, and the shifted ones above 0.

    Returns:
        A Fold, or a Refusal that says what stands in the way.
    """
    name = value.name or "?"
    try:
        if resolve(value) is not None:
            return Refusal(name, f"'{name}' is a constant")
        shape = dims(value)
    except Unfit as reason:
        return Refusal(name, str(reason))
    axis %= len(shape)
    length = shape[axis]
    if not isinstance(length, int):
        return Refusal(name, f"the number of channels of '{name}' is unknown")
    full = tuple(length if k == axis else 1 for k in range(len(shape)))
    region, labels = _explore(Region(model.graph, kind, {}, insert, loose), value, full)
    ties, reason = _ties(region, labels)
    if np.all(ties < 0):
        return Refusal(name, reason)
    mixed, reason = blocks.find_blocks(region, labels) if kind == "rotate" else ((), "")
    if kind == "rotate" and not mixed:
        return Refusal(name, reason)
    edits = list(region.edits.values())
    writers = tuple(e for e in edits if e.sign > 0)
    return Fold(model, value, axis, kind, ties, writers, tuple(e for e in edits if e.sign < 0), region, labels, mixed)


def _explore(region: Region, value: ir.Value, shape: tuple[int, ...]) -> tuple[Region, Labels]:
    labels = region.classes.fresh(shape)
    region.begin(value, labels)
    try:
        region.grow(_apply_rule, labels)
    except Undecided as undecided:
        if len(region.choices) == _CHOICES:
            region.pin(labels, f"too many products lead to {label(undecided.node)}")
            return region, labels
        choices = [{**region.choices, undecided.node: k} for k in range(2)]
        tries = [Region(region.graph, region.kind, c, region.insert, region.loose) for c in choices]
        return max((_explore(t, value, shape) for t in tries), key=lambda found: int((_ties(*found)[0] >= 0).sum()))
    return region, labels


def _apply_rule(region: Region, node: ir.Node) -> None:
    rule = RULES.get(node.op_type) if node.domain in DOMAINS else None
    region.positive |= rule is not None and node.op_type in POSITIVE
    try:
        if rule is None:
            refuse(node, region.kind)
        rule(region, node)
    except Unfit as reason:
        region.pin_node(node, str(reason))


def _ties(region: Region, start: Labels) -> tuple[Labels, str]:
    """Tie numbers of the channels (-1: fixed) and the first reason for a fixed one."""
    roots = region.classes.roots(start).reshape(-1)
    pinned = region.classes.pinned()
    _, ties, counts = np.unique(roots, return_inverse=True, return_counts=True)
    fixed = np.isin(roots, list(pinned))
    if region.kind == "permute":  # channels that are one for some operation have no order among them
        fixed |= counts[ties] > 1
    reason = next((text for root, text in pinned.items() if root in roots), "all its channels are tied")
    return np.where(fixed, -1, ties).astype(np.int64), reason
