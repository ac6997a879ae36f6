"""Hold EXACT passes to their word: the same function before and after, in float32, outliers included.

Both graphs run in ONNX Runtime on a few calibration samples and on the same samples with outliers: some
channels of float inputs, and of what integer inputs look up, are a hundred times larger. Where rounding alone
moves an output by more than the bound (all weights wrong by a last bit), a multiple of that is the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration import Calibration
from qcompiler.errors import BadData, ContractViolated
from qcompiler.measure.runner import Runner
from qcompiler.measure.segments import Segments
from qcompiler.model import Model

if TYPE_CHECKING:
    from qcompiler.pipeline import Pass, PassReport

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
BOUND = 1e-5  # max|y - y'| / max|y|
_NOISE = 16.0  # times what one last bit in every weight does
_LOOSEST = 1e-2
_SAMPLES = 2
_KEPT_BYTES = 256 << 20
_MOST_ELEMENTS = 1 << 23  # of an output that is compared; every row depends on (nearly) every weight
_CHUNK = 1 << 20  # elements
_OUTLIERS = 100.0


def checked(pass_: Pass, model: Model, run: Callable[[], PassReport]) -> PassReport:
    """Run an EXACT pass and compare the graph with what it was.

    Raises:
        ContractViolated: names the pass, the output, and the first value after which nothing agrees any more
            (models of more than 256 MB are not kept for that: there it names the output only).
    """
    large = _weight_bytes(model.ir) > _KEPT_BYTES
    quiet = _samples(model, 1 if large else _SAMPLES)
    points = _look_ups(model.ir)
    loud = {k: _louder(v) if v.dtype.kind == "f" else v for k, v in quiet.items()}
    before = _Record.of(model.ir, quiet, points), _outlying(_with_outliers(model.ir, points), loud)
    kept = None if large else model.ir.clone()
    report = run()
    name = type(pass_).registered_name()
    after = _Record.of(model.ir, quiet, points)
    _compare(name, before[0], after, model.ir, kept)
    if before[1] and all(_difference(before[0].points[p], after.points.get(p)) <= BOUND for p in points):
        changed = _with_outliers(model.ir, points)
        kept = None if kept is None else _with_outliers(kept, points)
        _compare(name, before[1], _Record.of(changed, loud, ()), changed, kept)
    return report


@dataclass(frozen=True)
class _Record:
    """What a graph computed: its outputs, and some values inside; of very large arrays some rows."""

    feeds: Feeds
    outputs: Mapping[str, Array]
    points: Mapping[str, Array]

    @staticmethod
    def of(model: ir.Model, feeds: Feeds, points: Sequence[str]) -> _Record:
        names = [v.name or "" for v in model.graph.outputs]
        there = {v.name for node in model.graph for v in node.outputs}
        found = Runner(model, outputs=[*names, *(p for p in points if p in there)])(feeds)
        return _Record(feeds, {n: _thin(found[n]) for n in names}, {p: found[p] for p in points if p in found})


def _thin(array: Array) -> Array:
    """Some rows of an array that is too large to keep several of it (logits of a language model)."""
    step = -(-array.size // _MOST_ELEMENTS)
    return array if step <= 1 or array.ndim < 2 else array.reshape(-1, array.shape[-1])[::step].copy()


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _outlying(model: ir.Model, feeds: Feeds) -> _Record | None:
    """What outliers do to the model; None where it takes none, as one that makes indices of a float input."""
    try:
        return _Record.of(model, feeds, ())
    except BadData:
        return None


def _samples(model: Model, count: int) -> Feeds:
    data = model.calibration or Calibration.synthetic_for(model.ir, count, text=False)
    return next(iter(data.batches(count, count)))


def _louder(array: Array) -> Array:
    """Some channels a hundred times larger: of axis 1 for images, else of the last axis."""
    axis = 1 if array.ndim == 4 else -1
    if array.ndim < 2:
        return array
    factor = _outlier_factors(array.shape[axis])
    return array * (factor.reshape(-1, 1, 1) if axis == 1 else factor).astype(array.dtype)


def _outlier_factors(channels: int) -> npt.NDArray[np.float32]:
    factors = np.ones(channels, np.float32)
    count = min(4, max(1, channels // 4))
    factors[np.random.default_rng(0).choice(channels, count, replace=False)] = _OUTLIERS
    return factors


def _look_ups(model: ir.Model) -> list[str]:
    """Rows of embedding tables: everything behind them may be fed with outliers, if a pass leaves them alone."""
    gathers = [n for n in model.graph if n.op_type == "Gather" and n.inputs[0] is not None]
    return [n.outputs[0].name or "" for n in gathers if n.inputs[0] is not None and _is_table(n.inputs[0])]


def _is_table(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def _with_outliers(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy in which some values are multiplied channel by channel; the same factors for every copy."""
    wanted = set(names)
    if not wanted:
        return model
    copy = model.clone()
    for node in list(copy.graph):
        value = node.outputs[0]
        if value.name not in wanted:
            continue
        assert node.inputs[0] is not None
        assert node.inputs[0].const_value is not None
        width = int(node.inputs[0].const_value.numpy().shape[-1])
        factors = ir.val(f"{value.name}/outliers", const_value=ir.tensor(_outlier_factors(width)))
        copy.graph.register_initializer(factors)
        users = list(value.uses())
        product = ir.node("Mul", [value, factors])
        product.outputs[0].name = f"{value.name}/loud"
        product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
        copy.graph.insert_after(node, product)
        for user, index in users:
            user.replace_input_with(index, product.outputs[0])
    return copy


def _compare(name: str, old: _Record, new: _Record, after: ir.Model, kept: ir.Model | None) -> None:
    if set(old.outputs) != set(new.outputs):
        raise ContractViolated(f"pass '{name}' changed the outputs of the graph")
    found = {key: _difference(array, new.outputs[key]) for key, array in old.outputs.items()}
    if max(found.values(), default=0.0) <= BOUND:
        return
    jittered = {key: _thin(array) for key, array in _jittered(after, new.feeds).items()}
    for key, difference in found.items():
        bound = max(BOUND, min(_NOISE * _difference(new.outputs[key], jittered[key]), _LOOSEST))
        if difference > bound:
            where = "model" if kept is None else _first_difference(kept, after, new.feeds, bound)
            what = f"pass '{name}' changed the function: '{key}' differs by {difference:.1e} (bound {bound:.1e})"
            raise ContractViolated(what, where, "this is a bug of the pass; leave it out of the pipeline")


def _difference(a: Array, b: Array | None) -> float:
    """max|a - b| / max|a|; for integers the share of entries that differ, less one in a hundred."""
    if b is None or a.shape != b.shape:
        return np.inf
    if a.size == 0:
        return 0.0
    if a.dtype.kind != "f":
        return max(0.0, float(np.mean(a != b)) - 0.01)
    good = np.isfinite(a)
    if not np.array_equal(good, np.isfinite(b)):
        return np.inf
    if not good.any():
        return 0.0
    flat, other = a.reshape(-1), b.reshape(-1)
    most = reach = 0.0
    for start in range(0, a.size, _CHUNK):  # as float64, a part at a time
        part = np.where(good.reshape(-1)[start : start + _CHUNK], flat[start : start + _CHUNK], 0).astype(np.float64)
        new = np.where(good.reshape(-1)[start : start + _CHUNK], other[start : start + _CHUNK], 0)
        most = max(most, float(np.abs(part - new).max()))
        reach = max(reach, float(np.abs(part).max()))
    return most / reach if reach > 0 else (np.inf if most > 0 else 0.0)


def _jittered(model: ir.Model, feeds: Feeds) -> Feeds:
    """The outputs with all float weights wrong by about one last bit; numbers such as exponents and sizes stay.

    Segment by segment, so that the changed weights of one segment are alive at a time.
    """
    chain, rng = Segments(model), np.random.default_rng(0)
    boundary = chain.start(feeds)
    for segment in chain:
        change: dict[str, Array] = {}
        for name in sorted(segment.weights):
            value = model.graph.initializers[name]
            if value.const_value is not None and _is_weight(value, value.const_value):
                change[name] = _last_bits(value.const_value.numpy(), rng)
        boundary = segment.run(boundary, change)
        segment.drop()
    return {name: boundary[name] for name in (v.name or "" for v in model.graph.outputs)}


def _is_weight(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Whether a last bit more or less is noise: the factors of a Resize decide the size of its output."""
    sizes = any(user.op_type in ("Resize", "Upsample") for user in value.consumers())
    return tensor.dtype == ir.DataType.FLOAT and tensor.size > 1 and not sizes


def _last_bits(array: Array, rng: np.random.Generator) -> Array:
    noise = rng.integers(-1, 2, array.shape, np.int8).astype(np.float32)
    noise *= np.float32(2**-23)
    noise *= array
    noise += array
    return noise


def _first_difference(before: ir.Model, after: ir.Model, feeds: Feeds, bound: float) -> str:
    """The first value behind which everything differs: what a pass moves on purpose agrees again further on."""
    old_names = {v.name for node in before.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT}
    values = [v for node in after.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    names = [v.name for v in values if v.name in old_names and v.name is not None]
    old, new = Runner(before, outputs=names)(feeds), Runner(after, outputs=names)(feeds)
    lost: set[ir.Value] = set()
    for value in reversed(values):
        if value.name in old and _difference(old[value.name], new[value.name]) <= bound:
            continue
        behind = [v for user in value.consumers() for v in user.outputs if v.dtype == ir.DataType.FLOAT]
        if all(v in lost for v in behind):
            lost.add(value)
    first = next((v for v in values if v in lost), None)
    node = None if first is None else first.producer()
    return "model" if first is None or node is None else f"'{first.name}' of {node.op_type} '{node.name}'"
