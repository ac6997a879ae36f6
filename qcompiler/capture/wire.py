"""The protobuf wire format of an ONNX file, walked without parsing it.

The file is memory-mapped and only lengths are read, so a hostile or truncated file is refused before a
parser allocates anything. The walk also finds where the large weights lie in the file: `strip` returns the
model without them, small enough to parse, so that no weight passes through protobuf.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from qcompiler.errors import BadModel

Bytes = bytes | mmap.mmap
MAX_NODES = 200_000
MAX_DEPTH = 16  # protobuf's own parser gives up at about 30 nested subgraphs
INLINE_LIMIT = 1 << 16  # bytes; smaller tensors stay in the model

VARINT, LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}
MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER, NODE_ATTRIBUTE, TENSOR_RAW = 7, 1, 5, 5, 9
_ATTRIBUTE_GRAPHS = (6, 11)
_FUNCTION_NODE = 7
_MODEL_FUNCTION = 25


@dataclass(frozen=True)
class Field:
    """One field: its bytes are buffer[start:end], its value without tag and length buffer[value:end]."""

    number: int
    kind: int
    start: int
    value: int
    end: int


@dataclass
class Stripped:
    """A model without its large weights.

    Attributes:
        data: a serialized ModelProto.
        raw: index in graph.initializer -> (offset, length) of the raw data in the file, in bytes.
        nodes: how many nodes there are, subgraphs and functions included.
    """

    data: bytes = b""
    raw: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    nodes: int = 0


def strip(buffer: Bytes, where: str) -> Stripped:
    """Cut the large raw tensors of the main graph's initializers out of a serialized ModelProto.

    Raises:
        BadModel: the bytes are not a protobuf message, or cut off, or nested or numerous beyond reason.
    """
    result, pieces, graphs = Stripped(), list[bytes](), 0
    for item in fields(buffer, 0, len(buffer), where):
        if item.number == MODEL_GRAPH and item.kind == LENGTH:
            graphs += 1
            _count(buffer, item, result, 0, where)
            pieces.append(_message(MODEL_GRAPH, _strip_graph(buffer, item, result, where)))
            continue
        if item.number == _MODEL_FUNCTION and item.kind == LENGTH:
            _count(buffer, item, result, 0, where, node=_FUNCTION_NODE)
        pieces.append(buffer[item.start : item.end])
    if graphs != 1:
        raise BadModel("not an ONNX model: it holds no graph" if not graphs else "holds two graphs", where)
    result.data = b"".join(pieces)
    return result


def fields(buffer: Bytes, start: int, end: int, where: str) -> Iterator[Field]:
    """The fields of the message in buffer[start:end].

    Raises:
        BadModel: a length or a tag that cannot be.
    """
    position = start
    while position < end:
        tag, value = _varint(buffer, position, end, where)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, stop = _varint(buffer, value, end, where)
        elif kind == LENGTH:
            size, value = _varint(buffer, value, end, where)
            stop = value + size
        elif kind in _FIXED:
            stop = value + _FIXED[kind]
        else:
            raise BadModel("not an ONNX model: its bytes are no protobuf message", where)
        if stop > end or number == 0:
            raise BadModel(f"broken or cut off at byte {position}", where, "copy or download the file again")
        yield Field(number, kind, position, value, stop)
        position = stop


def _varint(buffer: Bytes, position: int, end: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BadModel(f"broken or cut off at byte {position}", where, "copy or download the file again")


def _count(buffer: Bytes, graph: Field, result: Stripped, depth: int, where: str, node: int = GRAPH_NODE) -> None:
    """Count nodes in a graph and the graphs in its attributes."""
    if depth > MAX_DEPTH:
        raise BadModel(f"subgraphs are nested more than {MAX_DEPTH} deep", where)
    for item in fields(buffer, graph.value, graph.end, where):
        if item.number != node or item.kind != LENGTH:
            continue
        result.nodes += 1
        if result.nodes > MAX_NODES:
            raise BadModel(f"has more than {MAX_NODES} nodes", where)
        for attribute in fields(buffer, item.value, item.end, where):
            if attribute.number == NODE_ATTRIBUTE and attribute.kind == LENGTH:
                for inner in fields(buffer, attribute.value, attribute.end, where):
                    if inner.number in _ATTRIBUTE_GRAPHS and inner.kind == LENGTH:
                        _count(buffer, inner, result, depth + 1, where)


def _strip_graph(buffer: Bytes, graph: Field, result: Stripped, where: str) -> bytes:
    pieces, index = list[bytes](), 0
    for item in fields(buffer, graph.value, graph.end, where):
        if item.number != GRAPH_INITIALIZER or item.kind != LENGTH:
            pieces.append(buffer[item.start : item.end])
            continue
        inner = list(fields(buffer, item.value, item.end, where))
        raw = [f for f in inner if f.number == TENSOR_RAW and f.kind == LENGTH]
        if raw and raw[-1].end - raw[-1].value > INLINE_LIMIT:
            result.raw[index] = (raw[-1].value, raw[-1].end - raw[-1].value)
            rest = b"".join(buffer[f.start : f.end] for f in inner if f not in raw)
            pieces.append(_message(GRAPH_INITIALIZER, rest))
        else:
            pieces.append(buffer[item.start : item.end])
        index += 1
    return b"".join(pieces)


def _message(number: int, data: bytes) -> bytes:
    return _encode(number << 3 | LENGTH) + _encode(len(data)) + data


def _encode(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


Kind = Literal["text", "lfs", "zip", "proto"]


def sniff(head: bytes) -> Kind:
    """What a file seems to be by its first bytes."""
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    printable = sum(32 <= b < 127 or b in b"\t\r\n" for b in head)
    return "text" if head and printable == len(head) else "proto"
