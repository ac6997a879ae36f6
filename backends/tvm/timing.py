"""What the clock of target cpu runs: its own kernels on their own, with random data at the sizes of a model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.backends.tvm.conv_sites import geometry_of
from qcompiler.backends.tvm.geometry import FlatFormat, Geometry
from qcompiler.backends.tvm.kernels import KernelSet
from qcompiler.backends.tvm.layout import LANES, QUAD, Tiling, tiling_for
from qcompiler.formats import QuantSpec
from qcompiler.formats.packing import plane_widths
from qcompiler.graph.sites import Site
from qcompiler.measure.latency import Part, Run, Shapes
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent

Array = npt.NDArray[Any]
_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Rows:
    """Quantizing (or padding) `count` rows of activations for products with weights of a tiling."""

    tiling: Tiling
    count: int
    integer: bool

    def kernel(self, kernels: KernelSet) -> str:
        """Its name in the set."""
        return kernels.quantize_rows(self.tiling) if self.integer else kernels.pad_rows(self.tiling)

    def arguments(self, rng: np.random.Generator) -> list[Array]:
        """Input and results."""
        return [_floats(rng, self.count, self.tiling.columns), *_rows_made(rng, self.tiling, self.count, self.integer)]


@dataclass(frozen=True)
class Product:
    """`count` rows of prepared activations times a weight."""

    tiling: Tiling
    count: int
    integer: bool

    def kernel(self, kernels: KernelSet) -> str:
        """Its name in the set."""
        return kernels.matmul(self.tiling, self.integer)

    def arguments(self, rng: np.random.Generator) -> list[Array]:
        """Rows, the weight's arrays, result."""
        rows = _rows_made(rng, self.tiling, self.count, self.integer)
        return [*rows, *_tiled(rng, self.tiling), np.zeros((self.count, self.tiling.rows), np.float32)]


@dataclass(frozen=True)
class Lookup:
    """`count` rows out of a table."""

    tiling: Tiling
    count: int

    def kernel(self, kernels: KernelSet) -> str:
        """Its name in the set."""
        return kernels.gather(self.tiling)

    def arguments(self, rng: np.random.Generator) -> list[Array]:
        """Indices, the table's arrays, result."""
        indices = rng.integers(0, self.tiling.rows, self.count)
        return [indices, *_tiled(rng, self.tiling), np.zeros((self.count, self.tiling.columns), np.float32)]


@dataclass(frozen=True)
class Convolution:
    """A convolution of pictures [batch, channels, *size]; `weight` is flat where there are groups of channels."""

    geometry: Geometry
    weight: Tiling | FlatFormat
    integer: bool
    batch: int
    size: tuple[int, int]
    out: tuple[int, int]

    def kernel(self, kernels: KernelSet) -> str:
        """Its name in the set."""
        if isinstance(self.weight, Tiling):
            return kernels.dense_conv(self.geometry, self.weight, self.integer)
        return kernels.grouped_conv(self.geometry, self.weight, self.integer)

    def arguments(self, rng: np.random.Generator) -> list[Array]:
        """Picture (with its grid, if it is of codes), the weight's arrays, result."""
        shape = (self.batch, self.geometry.channels, *self.size)
        data = [_bytes(rng, *shape), np.array([0.02], np.float32), np.array([128], np.int32)]
        if isinstance(self.weight, Tiling):
            weight = _tiled(rng, self.weight)
            if self.integer:
                weight.append(rng.integers(0, 1000, (self.weight.tiles, self.weight.groups, LANES)).astype(np.int32))
        else:
            weight = _flat(rng, self.weight, self.geometry)
        result = np.zeros((self.batch, self.geometry.rows, *self.out), np.float32)
        return [*(data if self.integer else [_floats(rng, *shape)]), *weight, result]


Work = Rows | Product | Lookup | Convolution


@dataclass(frozen=True)
class CpuClock:
    """Says which kernels a site runs under a plan, and builds them to be run alone (see `measure.latency.Clock`).

    Attributes:
        target: TVM's.
        dot: the integer dot product, "vnni" or "portable".
    """

    target: Any
    dot: str

    @property
    def machine(self) -> str:
        """All that a time depends on beside the work: kernels, compiler, processor, threads."""
        import tvm

        parts = [_sources(), importlib.metadata.version("apache-tvm"), str(self.target), self.dot, _processor()]
        return " ".join((*parts, str(tvm.runtime.num_threads())))

    def parts(self, site: Site, plan: SitePlan, shapes: Shapes) -> list[Part]:
        """The kernels of all operations that use the site's weight; none where it stays float.

        Rows that several products read are quantized once: each product bears its share.
        """
        if plan.weight is None:
            return []
        return [part for node in site.users for part in _parts(site, node, plan.weight, plan.activation, shapes)]

    def build(self, works: Sequence[Any]) -> Callable[[Any], Run]:
        """Compile the kernels of some works into one module; a work gets its data when it is asked for."""
        import tvm

        kernels = KernelSet(self.dot)
        names = {work: work.kernel(kernels) for work in works}
        module = kernels.compile(self.target, Silent())

        def prepare(work: Any) -> Run:
            function = module[names[work]]
            arguments = [tvm.runtime.tensor(a) for a in work.arguments(np.random.default_rng(0))]
            return lambda: function(*arguments)

        return prepare


def _parts(site: Site, node: ir.Node, spec: QuantSpec, activation: str, shapes: Shapes) -> list[Part]:
    if node.op_type == "Conv":
        return [Part(_convolution(site, node, spec, activation == "static", shapes))]
    t = tiling_for(spec, site.rows, site.columns)
    if node.op_type == "Gather":
        return [Part(Lookup(t, prod(_shape(shapes, node.inputs[1]))))]
    source, integer = node.inputs[0], activation == "dynamic"
    count = prod(_shape(shapes, source)[:-1])
    return [Part(Rows(t, count, integer), 1 / _readers(source)), Part(Product(t, count, integer))]


def _readers(value: ir.Value | None) -> int:
    """Products that read a value as their left operand."""
    assert value is not None
    return sum(use.node.op_type in _PRODUCTS and use.idx == 0 for use in value.uses())


def _convolution(site: Site, node: ir.Node, spec: QuantSpec, static: bool, shapes: Shapes) -> Convolution:
    geometry, _ = geometry_of(node, site)
    batch, _, *size = _shape(shapes, node.inputs[0])
    out = _shape(shapes, node.outputs[0])[2:]
    per_row = spec.granularity.grid(site.rows, site.columns)[1] == 1
    weight: Tiling | FlatFormat = tiling_for(spec, site.rows, site.columns)
    if geometry.groups > 1:
        groups = spec.granularity.grid(site.rows, site.columns)[1]
        weight = FlatFormat(spec.bits, groups, weight.group, not spec.symmetric, spec.scale_dtype)
    integer = static and (geometry.groups == 1 or per_row)
    return Convolution(geometry, weight, integer, batch, _both(size), _both(out))


def _both(size: Sequence[int]) -> tuple[int, int]:
    """Height and width; a line is a picture of height 1."""
    return (size[0], size[1]) if len(size) == 2 else (1, size[0])


def _shape(shapes: Shapes, value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    return shapes[str(value.name)]


def _floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def _bytes(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(0, 256, shape, np.uint8)


def _rows_made(rng: np.random.Generator, t: Tiling, count: int, integer: bool) -> list[Array]:
    """What `Rows` writes and `Product` reads."""
    width = t.words * QUAD
    if not integer:
        return [_floats(rng, count, width)]
    sums = rng.integers(-100, 100, (count, t.groups)).astype(np.int32)
    return [rng.integers(-127, 128, (count, width), np.int8), np.full(count, 0.01, np.float32), sums]


def _tiled(rng: np.random.Generator, t: Tiling) -> list[Array]:
    """The arrays of `layout.tile`, without row sums."""
    planes = [_bytes(rng, t.tiles, t.words * width // 8, LANES * QUAD) for width in plane_widths(t.bits)]
    zeros = [_bytes(rng, t.tiles, -(-t.groups * t.zero_bits // 8), LANES)] if t.zeros else []
    return [*planes, _scales(t.scale_dtype, t.tiles, t.groups, LANES), *zeros]


def _flat(rng: np.random.Generator, fmt: FlatFormat, geometry: Geometry) -> list[Array]:
    """The arrays of `layout.flat`."""
    count = geometry.rows * geometry.columns
    planes = [_bytes(rng, -(-count * width // 8)) for width in plane_widths(fmt.bits)]
    zeros = [rng.integers(0, 1 << fmt.bits, (geometry.rows, fmt.groups)).astype(np.uint8)] if fmt.zeros else []
    return [*planes, _scales(fmt.scale_dtype, geometry.rows, fmt.groups), *zeros]


def _scales(dtype: str, *shape: int) -> Array:
    if dtype == "bfloat16":
        return np.full(shape, 0x3C00, np.uint16)  # 2^-7
    return np.full(shape, 2.0**-7, dtype)


def _sources() -> str:
    """A hash of the sources that make kernels and whole artifacts."""
    digest = hashlib.blake2b(digest_size=10)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    """The CPU's name as Linux gives it, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
