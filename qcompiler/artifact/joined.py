"""All samples through an artifact, and what its calls return as one array an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.artifact.loaded import Artifact
from qcompiler.calibration import Calibration
from qcompiler.errors import BadData, QcompilerError
from qcompiler.graph.dependence import outputs_of_inputs
from qcompiler.progress import Progress
from qcompiler.target import Feeds, Outputs

Array = npt.NDArray[Any]


def run_all(artifact: Artifact, model: ir.Model, samples: Calibration, batch: int, progress: Progress) -> Outputs:
    """The outputs for all samples, by name.

    An output with the samples on its first axis comes back so, in the order of the data; so does every output of a
    model that takes one sample a call. An output that the inputs do not reach, or that is the same for every batch,
    comes back as it is. Whether an output has the samples on its first axis is what the model declares, where that
    agrees with what it returns, and else what it does for two sizes of a batch.

    Args:
        artifact: runs.
        model: its QDQ reference.
        samples: from `Calibration.from_path`, so of one block.
        batch: samples a call, where the model leaves that open.
        progress: shows how far.

    Raises:
        BadData: an output is neither; it says how to run the model so that it comes back as it is.
    """
    feeds = list(samples.batches(batch))
    calls = [artifact.run(feed) for feed in progress.track(feeds, "running")]
    block = samples.blocks[0]
    if len(calls) == 1 and block.layout != "stacked" and block.step in (0, samples.count):
        return calls[0]
    if block.layout == "stacked" or block.step == 1:
        live = outputs_of_inputs(model.graph)
        return {name: _one_a_call(name, [c[name] for c in calls], name in live, block.step) for name in calls[0]}
    sizes = [_rows(feed) for feed in feeds]
    unclear = [name for name in calls[0] if _may_be_samples(name, calls, sizes)]
    first = _with_samples_first(artifact, model, samples, unclear, sizes)
    return {
        name: _concatenated(name, [c[name] for c in calls])[: samples.count]
        if name in first
        else _same(name, [c[name] for c in calls], block.step)
        for name in calls[0]
    }


def _rows(feed: Feeds) -> int:
    return next(len(array) for array in feed.values() if array.ndim)


def _may_be_samples(name: str, calls: Sequence[Outputs], sizes: Sequence[int]) -> bool:
    """Whether the first axis is as long as the batch, in every call."""
    return all(c[name].ndim > 0 and len(c[name]) == size for c, size in zip(calls, sizes, strict=True))


def _with_samples_first(
    artifact: Artifact, model: ir.Model, samples: Calibration, names: Sequence[str], sizes: Sequence[int]
) -> set[str]:
    """Those of the named outputs, as long as the batch in every call so far, that are so for any size of a batch."""
    declared = {name for name in names if _declares_samples(model.graph, name)}
    if len(set(sizes)) > 1 or samples.blocks[0].step or len(declared) == len(names):
        return set(names)
    other = 1 if sizes[0] > 1 else 2
    try:
        answer = artifact.run(next(samples.batches(other, other)))
    except QcompilerError:  # the model takes batches of this size only
        return set(names)
    return declared | {name for name in names if answer[name].ndim and len(answer[name]) == other}


def _declares_samples(graph: ir.Graph, name: str) -> bool:
    """Whether the first dimension of an output has the name of an input's first dimension."""
    output = next(value for value in graph.outputs if value.name == name)
    return (symbol := _first_symbol(output)) is not None and symbol in map(_first_symbol, graph.inputs)


def _first_symbol(value: ir.Value) -> str | None:
    first = value.shape[0] if value.shape else None
    return first.value if isinstance(first, ir.SymbolicDim) else None


def _one_a_call(name: str, arrays: Sequence[Array], live: bool, step: int) -> Array:
    """The answers of calls for one sample each: along a first axis, which a model that fixes it to 1 has already."""
    if not live:
        return arrays[0]
    if step == 1 and all(array.ndim and len(array) == 1 for array in arrays):
        return _concatenated(name, arrays)
    return _concatenated(name, [array[None] for array in arrays])


def _concatenated(name: str, arrays: Sequence[Array]) -> Array:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        forms = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        what = f"output '{name}' has entries of different shapes in different batches, {forms}"
        raise BadData(what, "--batch", "run all samples at once (--batch all), or those of one shape by themselves")
    return np.concatenate(arrays)


def _same(name: str, arrays: Sequence[Array], step: int) -> Array:
    """What every call gave."""
    if all(np.array_equal(arrays[0], other, equal_nan=arrays[0].dtype.kind == "f") for other in arrays[1:]):
        return arrays[0]
    what = f"output '{name}' {list(arrays[0].shape)} has no entry for each sample, and differs from batch to batch"
    fix = f"give {step} samples, as many as the model takes" if step else "run all samples at once: --batch all"
    raise BadData(what, "--batch", fix)
