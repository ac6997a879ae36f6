"""Tensors that lie in a file, brought into the model that is to be saved."""

from __future__ import annotations

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


def _held(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), tensor.dtype, shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string)
