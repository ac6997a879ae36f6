"""Samples from a file for an artifact, and arrays to a file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import OutputError

if TYPE_CHECKING:
    from qcompiler.artifact import Artifact
    from qcompiler.calibration import Calibration
    from qcompiler.target import Feeds


def read_samples(path: Path, artifact: Artifact) -> Calibration:
    """Data for the inputs of an artifact, checked against them.

    Raises:
        BadData: what is wrong with it, where, and what the model wants.
    """
    import onnx_ir as ir

    from qcompiler.calibration import Calibration

    return Calibration.from_path(path, ir.load(artifact.reference))


def batches(samples: Calibration, artifact: Artifact, batch: int | None, limit: int | None = None) -> list[Feeds]:
    """Samples in batches; this loads the artifact, so that loading is not part of what is timed later.

    Args:
        samples: data for the artifact's inputs.
        artifact: is run on one sample, to see how large its outputs are, if `batch` is None.
        batch: samples a run.
        limit: samples, all if None.
    """
    return list(samples.batches(samples_a_run(samples, artifact) if batch is None else batch, limit))


def samples_a_run(samples: Calibration, artifact: Artifact) -> int:
    """How many samples a run keep its outputs small; found by running one."""
    from qcompiler.build.samples import batch_for

    outputs = artifact.run(next(samples.batches(1, 1)))
    return batch_for(sum(array.nbytes for array in outputs.values()))


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an .npz, all or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part.npz")
    named: dict[str, Any] = dict(arrays)
    try:
        np.savez(part, **named)
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", str(path), "choose another file") from error
    finally:
        with suppress(OSError):  # what kept it from being written may keep it from being removed
            part.unlink(missing_ok=True)
