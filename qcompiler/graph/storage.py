"""Tensors that lie in a file: mapped, or brought into the model that is to be saved."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx_ir as ir


def embed(model: ir.Model) -> ir.Model:
    """Make every tensor of a model one that is saved with it, subgraphs and attributes included.

    The bytes stay where they are, memory-mapped, until they are written. `onnx_ir.external_data.load_to_model`
    instead closes the file under every other user of the tensor: the model that this one was cloned from, a
    session that reads the weights in place.

    Args:
        model: edited in place; its tensors may be shared with others, which keep theirs.

    Returns:
        The same model.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _held(value.const_value)
        for node in graph:
            for key, attribute in list(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[key] = ir.AttrTensor(key, _held(attribute.value))
    return model


def map_once(model: ir.Model) -> ir.Model:
    """Read all initializers of a file through one mapping of it.

    An `ir.ExternalTensor` maps the whole file for itself: a thousand of them take a thousand times its size of
    address space, which may be limited.

    Args:
        model: edited in place; it was written by us, so its tensors are where it says.

    Returns:
        The same model.
    """
    maps: dict[Path, mmap.mmap] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or not tensor.nbytes:
                continue
            path = Path(tensor.path)
            if path not in maps:
                with path.open("rb") as file:
                    maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            stored = np.frombuffer(maps[path], np.uint8, tensor.nbytes, tensor.offset or 0)
            shape = tensor.shape.numpy()
            if tensor.dtype.bitwidth < 8:
                value.const_value = ir.PackedTensor(stored, tensor.dtype, shape=shape, name=tensor.name)
            else:
                array = stored.view(tensor.dtype.numpy()).reshape(shape)
                value.const_value = ir.Tensor(array, tensor.dtype, name=tensor.name)
    return model


def _held(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), tensor.dtype, shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string)
