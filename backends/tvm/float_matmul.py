"""Batched float32 matrix product, for operands that are both activations (attention) or stay in float."""

from __future__ import annotations

from qcompiler.backends.tvm.lanes import Expr, argument, get, lanes, put, register, spread
from qcompiler.backends.tvm.layout import LANES
from qcompiler.backends.tvm.matmul import begin
from qcompiler.backends.tvm.tvm_api import B, IRBuilder, PrimFunc, T, Var

ROWS = 4  # rows and vectors of columns that one block of registers holds
VECTORS = 2
WIDTH = VECTORS * LANES


def float_matmul(name: str) -> PrimFunc:
    """Kernel of a [batch, m, k] times b [batch, k, n] -> [batch, m, n]; all sizes are known at run time."""
    batch, m, k, n = (Var(v, "int64") for v in ("batch", "m", "k", "n"))
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        a = argument("a", (batch, m, k), "float32")
        b = argument("b", (batch, k, n), "float32")
        c = argument("c", (batch, m, n), "float32")
        blocks = (m + (ROWS - 1)) // ROWS
        with B.parallel(batch * blocks) as job:
            at, first = job // blocks, job % blocks * ROWS
            rows = [T.min(first + r, m - 1) for r in range(ROWS)]  # rows past the end repeat the last one
            with B.serial(n // WIDTH) as column:
                _block(a, b, c, at, rows, column * WIDTH, k)
            _rest(a, b, c, at, rows, k, n)
    return ib.get()


def _block(a: Expr, b: Expr, c: Expr, at: Expr, rows: list[Expr], column: Expr, k: Expr) -> None:
    total = [[register("float32") for _ in range(VECTORS)] for _ in rows]
    line = [register("float32") for _ in range(VECTORS)]
    for registers in total:
        for one in registers:
            put(one, spread(B.float32(0)))
    with B.serial(k) as inner:
        for v in range(VECTORS):
            put(line[v], b[at, inner, lanes(column + v * LANES)])
        for row, registers in zip(rows, total, strict=True):
            for v, one in enumerate(registers):
                put(one, get(one) + spread(a[at, row, inner]) * get(line[v]))
    for row, registers in zip(rows, total, strict=True):
        for v, one in enumerate(registers):
            B.buffer_store(c, get(one), [at, row, lanes(column + v * LANES)])


def _rest(a: Expr, b: Expr, c: Expr, at: Expr, rows: list[Expr], k: Expr, n: Expr) -> None:
    """The last n % 32 columns."""
    total = [B.alloc_buffer((WIDTH,), "float32") for _ in rows]
    start, count = n // WIDTH * WIDTH, n % WIDTH
    for one in total:
        with B.serial(WIDTH) as j:
            B.buffer_store(one, B.float32(0), [j])
    with B.serial(k) as inner, B.serial(count) as j:
        for row, one in zip(rows, total, strict=True):
            B.buffer_store(one, one[j] + a[at, row, inner] * b[at, inner, start + j], [j])
    for row, one in zip(rows, total, strict=True):
        with B.serial(count) as j:
            B.buffer_store(c, one[j], [at, row, start + j])
