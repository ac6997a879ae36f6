"""ONNX -> Relax: TVM's importer, with converters for our packed nodes and for what it gets wrong."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import onnx

from qcompiler.backends.tvm.kernels import KernelSet
from qcompiler.backends.tvm.tvm_api import ir, onnx_frontend, relax, sym

Expr = Any  # TVM publishes no types


def import_model(model: onnx.ModelProto, kernels: KernelSet) -> Any:
    """A Relax module whose function `main` takes the graph's inputs in order.

    Kernels that turn out to be needed on the way (products of two activations) are added to the set.

    Raises:
        tvm.error.OpNotImplemented: for operations that neither TVM nor we know.
    """
    with _our_converters(kernels), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with redirect_stdout(StringIO()):  # the importer prints what it then raises
            return onnx_frontend.from_onnx(model, sanitize_input_names=False)


@contextmanager
def _our_converters(kernels: KernelSet) -> Generator[None]:
    original = onnx_frontend._get_convert_map

    class FloatProduct(_FloatProduct):
        kernel_set = kernels

    ours = {"MatMul": FloatProduct, "QcRows": Rows, "QcMatMul": Product, "QcGather": Lookup, "QcConv": Convolution}
    fixed = {"Range": Range, "Gather": Gather, "Reshape": Reshape, "Clip": Clip}
    onnx_frontend._get_convert_map = lambda: {**original(), **ours, **fixed}
    try:
        yield
    finally:
        onnx_frontend._get_convert_map = original


def _dims(value: Expr) -> list[Expr]:
    return list(value.ty.shape.values)


def _product(dims: list[Expr]) -> Expr:
    total: Expr = 1
    for dim in dims:
        total = total * dim
    return total


def _call(bb: Any, name: bytes | str, inputs: list[Expr], types: list[tuple[list[Expr], str]]) -> Expr:
    """Emit a call of a kernel that writes its last arguments."""
    symbol = name.decode() if isinstance(name, bytes) else name
    made = [relax.TensorType(shape, dtype) for shape, dtype in types]
    return bb.emit(relax.op.call_dps_packed(symbol, inputs, made if len(made) > 1 else made[0]))


class Rows(onnx_frontend.OnnxOpConverter):
    """QcRows: rows quantized to int8 (codes, scales, sums), or padded."""

    @classmethod
    def _impl_v1(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], _params: Any) -> Expr:
        *lead, last = _dims(inputs[0])
        rows = _product(lead)
        flat = bb.emit(relax.op.reshape(inputs[0], [rows, last]))
        width = int(attr["columns"])
        if not attr["integer"]:
            return _call(bb, attr["kernel"], [flat], [([rows, width], "float32")])
        types = [([rows, width], "int8"), ([rows], "float32"), ([rows, int(attr["groups"])], "int32")]
        return _call(bb, attr["kernel"], [flat], types)


class Product(onnx_frontend.OnnxOpConverter):
    """QcMatMul: the first input only tells the shape; then the rows and the weight."""

    @classmethod
    def _impl_v1(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], _params: Any) -> Expr:
        lead, columns = _dims(inputs[0])[:-1], int(attr["rows"])
        flat = _call(bb, attr["kernel"], list(inputs[1:]), [([_product(lead), columns], "float32")])
        return bb.emit(relax.op.reshape(flat, [*lead, columns]))


class _FloatProduct(onnx_frontend.OnnxOpConverter):
    """MatMul of float32 values with equal batches, or with a matrix on the right; TVM's own for all else."""

    kernel_set: KernelSet

    @classmethod
    def _impl_v13(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], params: Any) -> Expr:
        a, b = inputs
        if not (_is_known_float(a) and _is_known_float(b)):
            return _THEIR_MATMUL(bb, inputs, attr, params)
        (*lead, m, k), (*lead_b, _, n) = _dims(a), _dims(b)
        if not lead_b:
            shapes = [1, _product([*lead, m]), k], [1, k, n], [1, _product([*lead, m]), n]
        elif len(lead) == len(lead_b) and all(_same(x, y) for x, y in zip(lead, lead_b, strict=True)):
            batch = _product(lead)
            shapes = [batch, m, k], [batch, k, n], [batch, m, n]
        else:
            return _THEIR_MATMUL(bb, inputs, attr, params)
        operands = [bb.emit(relax.op.reshape(x, shape)) for x, shape in zip((a, b), shapes[:2], strict=True)]
        y = _call(bb, cls.kernel_set.float_matmul(), operands, [(shapes[2], "float32")])
        return bb.emit(relax.op.reshape(y, [*lead, m, n]))


def _is_known_float(value: Expr) -> bool:
    known = isinstance(value.ty, relax.TensorType) and isinstance(value.ty.shape, relax.ShapeExpr)
    return known and value.ty.ndim >= 2 and str(value.ty.dtype) == "float32"


def _same(x: Expr, y: Expr) -> bool:
    return sym.Analyzer().can_prove_equal(x, y)


_THEIR_MATMUL = onnx_frontend.MatMul._impl_v13


class Lookup(onnx_frontend.OnnxOpConverter):
    """QcGather: rows of a packed table."""

    @classmethod
    def _impl_v1(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], _params: Any) -> Expr:
        shape, columns = _dims(inputs[0]), int(attr["columns"])
        indices = bb.emit(relax.op.reshape(relax.op.astype(inputs[0], "int64"), [_product(shape)]))
        flat = _call(bb, attr["kernel"], [indices, *inputs[1:]], [([_product(shape), columns], "float32")])
        return bb.emit(relax.op.reshape(flat, [*shape, columns]))


class Convolution(onnx_frontend.OnnxOpConverter):
    """QcConv over one or two dimensions; the kernels are two-dimensional."""

    @classmethod
    def _impl_v1(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], _params: Any) -> Expr:
        x, rank = inputs[0], int(attr["spatial"])
        batch, _, *size = _dims(x)
        sizes = zip(size, attr["size"], attr["strides"], attr["dilations"], strict=True)
        pads = attr["pads"]
        out = [
            (s + pads[i] + pads[i + rank] - d * (k - 1) - 1) // stride + 1 for i, (s, k, stride, d) in enumerate(sizes)
        ]
        if rank == 1:
            x = bb.emit(relax.op.expand_dims(x, axis=2))
        shape = [batch, int(attr["rows"]), *([1] if rank == 1 else []), *out]
        y = _call(bb, attr["kernel"], [x, *inputs[1:]], [(shape, "float32")])
        return bb.emit(relax.op.squeeze(y, axis=[2])) if rank == 1 else y


class Range(onnx_frontend.OnnxOpConverter):
    """Range from 0 to a dimension of the model: its length is that dimension, not a new unknown."""

    @classmethod
    def _impl_v11(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], params: Any) -> Expr:
        start, limit, step = inputs
        if ir.is_prim_expr(limit) and _integer(start) == 0 and _integer(step) == 1:
            return relax.op.arange(0, limit, 1, "int64")
        return _THEIR_RANGE(bb, inputs, attr, params)


def _integer(value: Expr) -> int | None:
    """The value of a constant that is one integer."""
    constant = value.value.numpy() if isinstance(value, ir.GenericConst) else None
    return int(constant.item()) if constant is not None and constant.dtype.kind == "i" and constant.size == 1 else None


_THEIR_RANGE = onnx_frontend.Range._impl_v12


class Gather(onnx_frontend.OnnxOpConverter):
    """Gather that stays inside its table: TVM's own reads wild memory for an index out of range."""

    @classmethod
    def _impl_v13(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], params: Any) -> Expr:
        result = _THEIR_GATHER(bb, inputs, attr, params)
        if isinstance(result, relax.Call) and result.op.name == "relax.take":
            return relax.op.take(result.args[0], result.args[1], axis=int(attr.get("axis", 0)), mode="clip")
        return result


_THEIR_GATHER = onnx_frontend.Gather._impl_v13


class Reshape(onnx_frontend.OnnxOpConverter):
    """Reshape that makes a list of one dimension out of a dimension of the model."""

    @classmethod
    def _impl_v13(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], params: Any) -> Expr:
        if ir.is_prim_expr(inputs[0]) and _integer(inputs[1]) in (1, -1):
            return relax.ShapeExpr([inputs[0]])
        return _THEIR_RESHAPE(bb, inputs, attr, params)


_THEIR_RESHAPE = onnx_frontend.Reshape._impl_v13


class Clip(onnx_frontend.OnnxOpConverter):
    """Clip between two numbers: TVM's own compiles and runs four functions a node to see that they are no NaN."""

    @classmethod
    def _impl_v11(cls, bb: Any, inputs: list[Expr], attr: dict[str, Any], params: Any) -> Expr:
        x, low, high = (*inputs, None, None)[:3]
        if not all(bound is None or _is_number(bound) for bound in (low, high)):
            return _THEIR_CLIP(bb, inputs, attr, params)
        x = x if low is None else bb.emit(relax.op.maximum(x, low))
        return x if high is None else bb.emit(relax.op.minimum(x, high))


def _is_number(value: Expr) -> bool:
    return isinstance(value, ir.GenericConst) and bool(np.all(value.value.numpy() == value.value.numpy()))


_THEIR_CLIP = onnx_frontend.Clip._impl_v13
