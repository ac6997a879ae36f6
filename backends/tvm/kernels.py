"""The set of kernels that one model needs: each (template, parameters) once, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcompiler.backends.tvm.layout import Tiling
from qcompiler.progress import Progress


@dataclass
class KernelSet:
    """Kernels by their key, built on demand.

    Attributes:
        dot: the integer dot product of this machine, "vnni" or "portable".
    """

    dot: str
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict[tuple[Any, ...], str])
    _build: dict[str, Callable[[str], Any]] = field(default_factory=dict[str, Callable[[str], Any]])

    def quantize_rows(self, t: Tiling, limit: int = 127, clip: float = 1.0) -> str:
        """Name of the kernel that quantizes rows for products with weights of this tiling (`matmul.quantize_rows`)."""
        from qcompiler.backends.tvm import matmul

        key = (t.columns, t.group, t.padded, limit, clip)
        return self._name("rows", key, lambda name: matmul.quantize_rows(name, t, limit, clip))

    def pad_rows(self, t: Tiling) -> str:
        """Name of the kernel that pads float rows for products with weights of this tiling."""
        from qcompiler.backends.tvm import matmul

        return self._name("pad", (t.columns, t.group, t.padded), lambda name: matmul.pad_rows(name, t))

    def matmul(self, t: Tiling, integer: bool) -> str:
        """Name of a product's kernel."""
        from qcompiler.backends.tvm import matmul

        dot: Any = self.dot if integer else "float"
        return self._name("matmul", (t, dot), lambda name: matmul.matmul(name, t, dot))

    def gather(self, t: Tiling) -> str:
        """Name of an embedding's kernel."""
        from qcompiler.backends.tvm import matmul

        return self._name("gather", (t,), lambda name: matmul.gather(name, t))

    def dense_conv(self, geometry: Any, t: Tiling, integer: bool) -> str:
        """Name of the kernel of a convolution with one group."""
        from qcompiler.backends.tvm import conv

        dot: Any = self.dot if integer else "float"
        return self._name("conv", (geometry, t, dot), lambda name: conv.dense(name, geometry, t, dot))

    def grouped_conv(self, geometry: Any, fmt: Any, integer: bool) -> str:
        """Name of the kernel of a grouped convolution."""
        from qcompiler.backends.tvm import conv

        key = (geometry, fmt, integer)
        return self._name("grouped", key, lambda name: conv.grouped(name, geometry, fmt, integer))

    def float_matmul(self) -> str:
        """Name of the kernel of products of two activations."""
        from qcompiler.backends.tvm import float_matmul

        return self._name("float_matmul", (), float_matmul.float_matmul)

    def _name(self, kind: str, key: tuple[Any, ...], build: Callable[[str], Any]) -> str:
        name = self._names.setdefault((kind, *key), f"qc_{kind}_{len(self._names)}")
        self._build.setdefault(name, build)
        return name

    def __len__(self) -> int:
        return len(self._build)

    def compile(self, target: Any, progress: Progress) -> Any:
        """All kernels as one TVM module, or None if there are none."""
        import tvm

        functions = {n: build(n) for n, build in progress.track(list(self._build.items()), "Generating kernels")}
        return tvm.compile(tvm.IRModule(functions), target=target).mod if functions else None
