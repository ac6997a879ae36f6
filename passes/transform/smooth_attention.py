"""SmoothAttention: move the range of outlying channels of keys into the queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.folds.region import bias_add, resolve
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import Floats, channel_reach, require_float, spread
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.progress import Progress

_BETWEEN = frozenset({"Mul", "Div", "Add", "Sub", "Where", "Cast", "Identity"})  # scores and Softmax
_FUSED = frozenset({"Attention", "GroupQueryAttention"})
_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothAttention(Pass):
    """Divide channel i of the keys by max|k_i|^strength and multiply that of the queries.

    What a cache of keys stores has smaller outliers then, and scores stay as they are. The two channels that a rotary
    embedding turns together have one scale, and so have all query heads of a key head. Keys are measured where a layer
    makes them, before a rotary embedding: that turns within pairs, which share a scale anyway.

    Source: Lin et al., QServe (2405.04532), section 4.2.

    Attributes:
        strength: 0 changes nothing, 1 makes the largest key of all channels alike.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise BadOption(f"a strength of {self.strength} is not between 0 and 1", "pass 'smooth-attention'")

    def requires(self, model: Model) -> None:
        """Float weights, calibration data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Smooth the keys of every attention."""
        folds, refused = _key_folds(model)
        reach = channel_reach(model, {fold.value.name or "": fold.axis for fold in folds}, 100.0)
        ranges: dict[str, list[float]] = {}
        for fold in progress.track(folds, "smoothing keys"):
            name = fold.value.name or ""
            s = self._scales(fold, reach[name])
            fold.scale(s)
            ranges[name] = [spread(reach[name]), spread(reach[name] / s)]
        metrics = {"max_over_median": ranges} if ranges else {}
        return PassReport(self.registered_name(), len(folds), tuple(refused), metrics)

    def _scales(self, fold: Fold, reach: Floats) -> Floats:
        largest = fold.tied(reach, lambda group: float(group.max()))
        alive = (largest > 0) & fold.free
        return np.where(alive, np.maximum(np.where(alive, largest, 1.0) ** self.strength, _SMALLEST), 1.0)


def _key_folds(model: Model) -> tuple[list[Fold], list[Refusal]]:
    """For the keys of each attention a fold: on what a layer makes, with heads apart, else on the keys themselves."""
    made = _layer_outputs(model)
    folds: list[Fold] = []
    refused: list[Refusal] = []
    for node in (node for node in model.graph if _scores(node)):
        key = node.inputs[1]
        assert key is not None
        if any(key in fold.region.marks for fold in folds):
            continue  # several attentions read these keys
        axis = -1 if node.op_type in _FUSED else -2
        found = next((fold for value in _before(key, made) if (fold := _on_keys(model, value, -1, node))), None)
        found = found or _on_keys(model, key, axis, node)
        if found is None:
            refused.append(Refusal(node.name or key.name or "?", "no scale of keys can be absorbed"))
        else:
            folds.append(found)
    return folds, refused


def _on_keys(model: Model, value: ir.Value, axis: int, scores: ir.Node) -> Fold | None:
    """The fold on a value, if it scales the keys of `scores` as it scales the value, and the queries the other way."""
    fold = find_fold(model.ir, value, axis=axis)
    if isinstance(fold, Refusal):
        return None
    query, key = (fold.region.get(v) for v in scores.inputs[:2])
    return fold if query is not None and key is not None and key.sign == 1 and query.sign == -1 else None


def _layer_outputs(model: Model) -> set[ir.Value]:
    """What layers give out, biases added."""
    found: set[ir.Value] = set()
    for site in find_sites(model.ir):
        added = bias_add(site.node)
        found.add(site.node.outputs[0] if added is None else added[0].outputs[0])
    return found


def _before(value: ir.Value, wanted: set[ir.Value]) -> list[ir.Value]:
    """The nearest of these values that a value is made of."""
    found: list[ir.Value] = []
    todo, seen = [value], {value}
    while todo:
        current = todo.pop()
        if current in wanted:
            found.append(current)
            continue
        producer = current.producer()
        for operand in () if producer is None else producer.inputs:
            if operand is not None and operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return found


def _scores(node: ir.Node) -> bool:
    """Whether a node multiplies queries with keys: a product of two computed values that a Softmax follows."""
    if node.op_type in _FUSED:
        return node.inputs[1] is not None
    if node.op_type != "MatMul" or any(v is None or resolve(v) is not None for v in node.inputs):
        return False
    todo = list(node.outputs[0].consumers())
    for user in todo:  # grows as it goes
        if user.op_type == "Softmax":
            return True
        if user.op_type in _BETWEEN:
            todo += [later for later in user.outputs[0].consumers() if later not in todo]
    return False
