"""The arrays that a compiled model takes besides its inputs: packed weights and large float constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.backends.tvm import layout
from qcompiler.graph.functions import PackedWeight


@dataclass
class Parameters:
    """Parameters in the order in which the compiled function takes them; each packed weight is stored once.

    Attributes:
        values: graph inputs that stand for the arrays.
        arrays: the arrays, by the inputs' names.
    """

    values: list[ir.Value] = field(default_factory=list[ir.Value])
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict[str, npt.NDArray[Any]])
    _known: dict[tuple[int, str], list[ir.Value]] = field(default_factory=dict[tuple[int, str], list[ir.Value]])
    _tilings: dict[int, layout.Tiling] = field(default_factory=dict[int, layout.Tiling])

    def tiled(self, weight: PackedWeight, row_sums: bool = False) -> tuple[layout.Tiling, list[ir.Value]]:
        """The tiling of a weight and its arrays, shared by all its users (only `sums` comes on top)."""
        key = id(weight.dequantize)
        wanted = ["tiled", "sums"] if row_sums else ["tiled"]
        if any((key, kind) not in self._known for kind in wanted):
            tensor = weight.qtensor()
            self._tilings[key] = layout.tiling_of(tensor)
            arrays = layout.tile(tensor, self._tilings[key], row_sums=True)
            parts = {"sums": {"sums": arrays.pop("sums")}, "tiled": arrays}
            for kind in wanted:
                if (key, kind) not in self._known:
                    self._known[key, kind] = self._add(parts[kind])
        return self._tilings[key], [value for kind in wanted for value in self._known[key, kind]]

    def flat(self, weight: PackedWeight) -> list[ir.Value]:
        """The arrays of a weight in flat layout."""
        key = (id(weight.dequantize), "flat")
        if key not in self._known:
            self._known[key] = self._add(layout.flat(weight.qtensor()))
        return self._known[key]

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        """A float constant that is too large for the library itself."""
        return self._add({"value": array})[0]

    def save(self, path: Path) -> None:
        """Write all arrays as an uncompressed .npz."""
        np.savez(path, **self.arrays)  # type: ignore[arg-type]

    def _add(self, arrays: layout.Arrays) -> list[ir.Value]:
        made: list[ir.Value] = []
        for kind, array in arrays.items():
            name = f"w{len(self.values)}_{kind}"
            dtype = ir.DataType.from_numpy(array.dtype)
            made.append(ir.val(name, dtype=dtype, shape=ir.Shape(array.shape)))
            self.values.append(made[-1])
            self.arrays[name] = array
        return made
