"""What the integer inputs of a model mean, read off the graph and never off their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qcompiler.calibration.validate import dims

Role = Literal["tokens", "positions", "types", "mask", "codes"]
# Operations that hand integers on unchanged, from their first input.
_CARRIERS = frozenset(
    {"Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Flatten", "Expand", "Transpose", "Slice"}
)
_FEW = 16  # a table with no more rows than this distinguishes kinds of tokens


@dataclass(frozen=True)
class IntegerInput:
    """An integer input.

    Attributes:
        name: of the input.
        role: "tokens" indexes the largest embedding, "positions" and "types" a smaller one ("types" at most
            16 rows), "mask" is an input beside tokens that indexes nothing, "codes" one without tokens.
        size: values run from 0 to size - 1.
    """

    name: str
    role: Role
    size: int


def integer_inputs(model: ir.Model) -> list[IntegerInput]:
    """All integer and boolean inputs with their roles.

    An input is followed through reshapes and casts; where it indexes a constant table (Gather) or is
    expanded (OneHot), the table's length bounds its values.
    """
    inputs = [v for v in model.graph.inputs if v.dtype is not None and _countable(v.dtype)]
    tables = {str(v.name): _table_size(v) for v in inputs}
    largest = max((size for size in tables.values() if size), default=0)
    found: list[IntegerInput] = []
    for value in inputs:
        name, size = str(value.name), tables[str(value.name)]
        if size and size == largest:
            found.append(IntegerInput(name, "tokens", size))
        elif size:
            found.append(IntegerInput(name, "types" if size <= _FEW else "positions", size))
        else:
            binary = bool(largest) or value.dtype == ir.DataType.BOOL
            found.append(IntegerInput(name, "mask" if binary else "codes", 2 if binary else 128))
    return found


def _countable(dtype: ir.DataType) -> bool:
    return dtype.is_integer() or dtype == ir.DataType.BOOL


def _table_size(value: ir.Value) -> int:
    """Rows of the smallest constant table that a value indexes, 0 if it indexes none."""
    sizes: list[int] = []
    todo, seen = [value], {value}
    while todo:
        for node, index in todo.pop().uses():
            if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
                table, axis = dims(node.inputs[0]), node.attributes.get_int("axis", 0)
                if table and node.inputs[0].is_initializer() and (rows := table[axis or 0]):
                    sizes.append(rows)
            elif node.op_type == "OneHot" and index == 0 and node.inputs[1] is not None:
                depth = node.inputs[1].const_value
                if depth is not None:
                    sizes.append(int(depth.numpy().reshape(-1)[0]))
            elif node.op_type in _CARRIERS and index == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                todo.append(node.outputs[0])
    return min(sizes, default=0)
