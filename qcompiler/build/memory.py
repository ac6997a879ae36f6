"""Peak memory: expected before the work, and as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.artifact.verify import FreshProcess
from qcompiler.artifact.worker import own_peak
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.pipeline import Pass
from qcompiler.target import Backend, program_bytes

_PROGRAM = 250_000_000  # bytes: Python, ONNX Runtime and the libraries, measured on a model of a few kB


def expected_peak(
    model: Model, feeds: Mapping[str, npt.NDArray[Any]], backend: Backend, passes: Iterable[Pass] = ()
) -> int:
    """Expected peak resident bytes of compiling a model, together with the process that verifies it.

    The sum of: the program itself; what the target adds to it (`Backend`: `program_bytes`); the weights once (the
    memory-mapped original) and once more for what the transforms rewrite; the largest weight as float32 and its Gram
    matrix in float64 with factor and inverse (GPTQ); the samples of one batch; and eleven times the larger of these
    and the largest value that they become (measured on convolution nets and transformers: 8 to 15 times); and what the
    greediest of the passes says that it adds.

    Args:
        model: the float model.
        feeds: one batch of inputs.
        backend: the target.
        passes: that are run.
    """
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    sites = find_sites(model.ir)
    gram = max((3 * 8 * s.columns**2 + 3 * 4 * s.count for s in sites if s.activation is not None), default=0)
    samples = sum(array.nbytes for array in feeds.values())
    added = program_bytes(backend) + max((item.adds_bytes(model) for item in passes), default=0)
    return _PROGRAM + added + 2 * weights + gram + samples + 11 * max(samples, _largest(model, feeds))


def _largest(model: Model, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    """Bytes of the largest value, as far as shapes are known; dimensions that no input names count as 1."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        array = feeds.get(value.name or "")
        if array is not None and value.shape is not None:
            pairs = zip(value.shape, array.shape, strict=False)
            sizes |= {str(dim.value): size for dim, size in pairs if isinstance(dim, ir.SymbolicDim)}
    largest = 0
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                dims = [d if isinstance(d, int) else sizes.get(str(d.value), 1) for d in value.shape]
                largest = max(largest, 4 * prod(dims))
    return largest


def realised_peak() -> int:
    """Peak resident bytes: of this process, or of this and the one that verified the artifact together."""
    return max(own_peak(), FreshProcess.together)
