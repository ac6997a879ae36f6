"""Peak memory: expected before the work, and as it was."""

from __future__ import annotations

from qcompiler.artifact.verify import FreshProcess
from qcompiler.artifact.worker import own_peak
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.target import Backend, program_bytes

_PROGRAM = 250_000_000  # bytes: Python, ONNX Runtime and the libraries, measured on a model of a few kB


def expected_peak(model: Model, samples_bytes: int, backend: Backend) -> int:
    """Expected peak resident bytes of compiling a model, together with the process that verifies it.

    The sum of: the program itself; what the target adds to it (`Backend`: `program_bytes`); the weights once (the
    memory-mapped original) and once more for what the transforms rewrite; the largest weight as float32 and its Gram
    matrix in float64 with factor and inverse (GPTQ); and the samples of one batch with eight times their size for
    activations.

    Args:
        model: the float model.
        samples_bytes: size of one batch of inputs.
        backend: the target.
    """
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    sites = find_sites(model.ir)
    gram = max((3 * 8 * s.columns**2 + 3 * 4 * s.count for s in sites if s.activation is not None), default=0)
    return _PROGRAM + program_bytes(backend) + 2 * weights + gram + 9 * samples_bytes


def realised_peak() -> int:
    """Peak resident bytes: of this process, or of this and the one that verified the artifact together."""
    return max(own_peak(), FreshProcess.together)
