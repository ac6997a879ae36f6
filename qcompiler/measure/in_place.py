"""ONNX Runtime sessions that read the weights where they are, without a copy in the model that they parse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.scratch import forgetting

_WORTH_FORGETTING = 1 << 26  # bytes of weights
_INLINE_BYTES = 1 << 12  # ORT wants small constants (shapes, axes) inside the model
# It makes int8 codes, one scale for all, of weights that are meant to be float, wherever activations are quantized.
_UNWANTED = ["WeightBiasQuantization"]
_FOLDER_LESS = "held-in-memory"  # "file" name of tensors that are handed over as arrays


def open_in_place(model: ir.Model, options: Any) -> tuple[ort.InferenceSession, list[npt.NDArray[Any]]]:
    """A session on the CPU, and the arrays that it reads: keep them as long as the session.

    Args:
        model: its initializers are replaced by references, in place; tensors that others share stay as they are.
        options: `ort.SessionOptions`; the arrays are added to it.

    Raises:
        onnxruntime errors: the graph cannot be run.
    """
    graph = model.graph
    external = _externalize(graph)
    for inner in model.graphs():
        for value in inner.initializers.values():
            if inner is not graph and value.const_value is not None:
                value.const_value = _inline(value.const_value)
    if external:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in external.values()]
        options.add_external_initializers(list(external), values)
    proto = ir.to_proto(model).SerializeToString()
    large = sum(array.nbytes for array in external.values()) >= _WORTH_FORGETTING
    with forgetting() if large else nullcontext():  # it makes a copy of most weights, in the order its kernels want
        session = ort.InferenceSession(
            proto, options, providers=["CPUExecutionProvider"], disabled_optimizers=_UNWANTED
        )
    return session, list(external.values())


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    """The shape of a tensor as the graph writes it."""
    return ir.Shape([int(d) for d in tensor.shape])  # type: ignore[arg-type]


def _externalize(graph: ir.Graph) -> dict[str, npt.NDArray[Any]]:
    """Replace the large initializers by references; return their arrays. Packed types must stay inside."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        array = tensor.numpy()
        # bfloat16, int4, float8 ... come as numpy arrays of ml_dtypes, which OrtValue cannot hold
        if tensor.nbytes < _INLINE_BYTES or array.dtype.isbuiltin != 1:
            value.const_value = _inline(tensor)
            continue
        arrays[name] = np.ascontiguousarray(array)
        value.const_value = ir.ExternalTensor(
            _FOLDER_LESS, 0, tensor.nbytes, tensor.dtype, shape=shape_of(tensor), name=name
        )
    return arrays


def _inline(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """ORT would look for the file of an external tensor relative to the working folder."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.Tensor(tensor.numpy(), tensor.dtype, shape=shape_of(tensor), name=tensor.name)
    return tensor
