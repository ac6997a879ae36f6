"""Runs a model that qcompiler compiled for target cpu. Needs TVM and numpy, nothing of qcompiler.

model = load("folder")
outputs = model.run({"input": array})
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax


class Model:
    """A loaded library with its weights, which stay packed."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self._facts: dict[str, Any] = json.loads((folder / "model.json").read_text("utf-8"))
        _check_cpu(self._facts["features"])
        library: Any = tvm.runtime.load_module(str(folder / "model.so"))
        device: Any = tvm.cpu()
        self._machine: Any = relax.VirtualMachine(library, device)
        with np.load(folder / "model.npz") as arrays:
            # TVM's kernels want aligned memory: tvm.runtime.tensor copies into it, numpy promises nothing.
            self._weights = [tvm.runtime.tensor(arrays[name]) for name in self._facts["parameters"]]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """All outputs by name, for one batch of inputs by name."""
        arguments = [self._argument(feeds, **entry) for entry in self._facts["inputs"]]
        result = self._machine["main"](*arguments, *self._weights)
        names = self._facts["outputs"]
        values = [result] if len(names) == 1 else list(result)
        return {name: _array(value) for name, value in zip(names, values, strict=True)}

    @staticmethod
    def _argument(feeds: Mapping[str, Any], name: str, dtype: str, shape: list[Any]) -> Any:
        if name not in feeds:
            raise ValueError(f"input '{name}' is missing")
        array = np.asarray(feeds[name], dtype=dtype, order="C")
        fits = array.ndim == len(shape) and all(
            not isinstance(want, int) or want == have for want, have in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"input '{name}' has shape {list(array.shape)}, the model takes {shape}")
        return tvm.runtime.tensor(array)


def _array(value: Any) -> Any:
    """An output; where the model returns a shape, TVM gives a tuple of numbers."""
    return value.numpy() if hasattr(value, "numpy") else np.asarray([int(d) for d in value], np.int64)


def _check_cpu(features: list[str]) -> None:
    """Refuse a library whose instructions this CPU may lack, instead of dying of one."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return
    line = next((x for x in text.splitlines() if x.startswith("flags")), None)
    missing = sorted(set(features) - set(line.split())) if line is not None else []
    if missing:
        raise RuntimeError(f"this model was compiled for a CPU with {', '.join(missing)}; compile it on this machine")


def load(folder: str | Path) -> Model:
    """Load what qcompiler wrote into a folder."""
    return Model(folder)
