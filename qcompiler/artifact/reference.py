"""Write the QDQ reference: model.onnx, with its large tensors beside it where one file cannot hold them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from qcompiler.artifact.manifest import REFERENCE
from qcompiler.graph.storage import embed

_ONE_FILE = 1_500_000_000  # bytes; a protobuf message ends at 2 GiB


def save_reference(model: ir.Model, folder: Path) -> Path:
    """Write a model as folder/model.onnx and return that path.

    Nothing in the file points outside the folder: tensors that lie in other files are copied, and the stack
    traces that torch's exporter leaves (paths of the machine it ran on) are dropped.
    """
    path = folder / REFERENCE
    for node in RecursiveGraphIterator(model.graph):
        for key in [k for k in node.metadata_props if "stack_trace" in k]:
            del node.metadata_props[key]
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > _ONE_FILE:
        ir.save(model, path, external_data=f"{REFERENCE}.data")
    else:
        ir.save(embed(model.clone()), path)
    return path
