"""Where the bytes of every tensor of an untrusted model are, and their private copy.

Declared sizes are held against the bytes that exist before anything is allocated for them. External data may
only be a plain file beside the model, reached without links; the bytes are copied into a private folder, so
that nobody can swap them after the check.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompiler.errors import BadModel, OutputError

DATA_FILE = "weights.data"
_ALIGNMENT = 4096
_CHUNK = 1 << 24
_BY_TYPE = {  # TensorProto fields that hold typed values, and how many bits of a value one entry holds
    "float_data": 32,
    "double_data": 64,
    "int64_data": 64,
    "uint64_data": 64,
}


@dataclass(frozen=True)
class Span:
    """Bytes of a file: [offset, offset + length)."""

    path: Path
    offset: int
    length: int


@dataclass
class Sources:
    """Tensors whose bytes lie in files.

    Attributes:
        spans: pairs of a TensorProto and where its bytes are.
        notes: names of tensors with "nan" or "inf" among their values, filled by `copy_data`.
    """

    spans: list[tuple[onnx.TensorProto, Span]] = field(default_factory=list[tuple[onnx.TensorProto, Span]])
    notes: dict[str, str] = field(default_factory=dict[str, str])


def all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph: initializers, attributes, subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        yield from node_tensors(node)


def node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the attributes of a node, subgraphs included."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from all_tensors(graph)


def byte_size(tensor: onnx.TensorProto, where: str) -> int:
    """Bytes that the declared shape and type need; -1 for strings.

    Raises:
        BadModel: a negative dimension, an unknown type, a size beyond 2^62.
    """
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise BadModel(f"tensor '{tensor.name}' has the unknown data type {tensor.data_type}", where)
    count = 1
    for dim in tensor.dims:
        if dim < 0:
            raise BadModel(f"tensor '{tensor.name}' has a negative dimension: {list(tensor.dims)}", where)
        count *= dim
    if count >= 1 << 56:
        raise BadModel(f"tensor '{tensor.name}' declares an impossible shape: {list(tensor.dims)}", where)
    return -1 if dtype == ir.DataType.STRING else (count * int(dtype.bitwidth) + 7) // 8


def check_inline(tensor: onnx.TensorProto, where: str) -> None:
    """Hold the values in the message against the declared shape."""
    needed = byte_size(tensor, where)
    count = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    if needed < 0:
        present, needed = len(tensor.string_data), count
    elif tensor.HasField("raw_data"):
        present = len(tensor.raw_data)
    else:
        present, needed = _typed(tensor, count)
    if present != needed:
        raise misfit(tensor, where)


def misfit(tensor: onnx.TensorProto, where: str) -> BadModel:
    """The error for data that is not as long as the shape says."""
    return BadModel(
        f"tensor '{tensor.name}' declares the shape {list(tensor.dims)}, which its data does not fit", where
    )


def _typed(tensor: onnx.TensorProto, count: int) -> tuple[int, int]:
    """(entries present, entries needed) of a tensor in typed fields."""
    dtype = ir.DataType(tensor.data_type)
    parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    for name in _BY_TYPE:
        if len(getattr(tensor, name)):
            return len(getattr(tensor, name)), count * parts
    per_entry = max(1, 8 // int(dtype.bitwidth)) if dtype.bitwidth < 8 else 1
    return len(tensor.int32_data), -(-count // per_entry)


def external_span(tensor: onnx.TensorProto, folder: Path, where: str) -> Span:
    """Check a tensor's reference to an external file and say where its bytes are.

    Raises:
        BadModel: the path leaves the folder, is or passes a link, is no plain file, or is too short.
    """
    entries = {e.key: e.value for e in tensor.external_data}
    path = _plain_file(entries.get("location", ""), folder, tensor.name, where)
    needed, size = byte_size(tensor, where), path.stat().st_size
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(needed)))
    except ValueError as error:
        raise BadModel(f"tensor '{tensor.name}' has an external offset or length that is no number", where) from error
    if needed < 0 or length != needed:
        raise misfit(tensor, where)
    if offset < 0 or offset + length > size:
        raise BadModel(
            f"tensor '{tensor.name}' needs bytes {offset} to {offset + length} of '{path.name}', which has {size}",
            where,
            "copy or download the data file again",
        )
    return Span(path, offset, length)


def _plain_file(location: str, folder: Path, name: str, where: str) -> Path:
    parts = PurePosixPath(location).parts
    outside = PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute()
    if not parts or outside or ".." in parts or "\\" in location or "\0" in location:
        raise BadModel(
            f"tensor '{name}' points outside of the model's folder ('{location}')", where, "keep data beside the model"
        )
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BadModel(f"the data file '{location}' is a link", where, "copy the model with `cp -RL`")
    try:
        status = path.stat()
    except OSError as error:
        raise BadModel(f"the data file '{location}' is missing", where, "put it beside the model") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadModel(f"the data file '{location}' is not a plain file", where)
    if status.st_nlink > 1:
        raise BadModel(f"the data file '{location}' is a hard link", where, "copy it with `cp`")
    return path


def check_overlap(sources: Sources, where: str) -> None:
    """Refuse tensors that share bytes without being the same bytes: a small file must not become a large copy."""
    spans = sorted({(str(s.path), s.offset, s.length) for _, s in sources.spans if s.length})
    for (path, offset, length), (next_path, next_offset, _) in pairwise(spans):
        if path == next_path and offset + length > next_offset:
            raise BadModel(f"tensors overlap at byte {next_offset} of '{Path(path).name}'", where)


def copy_data(sources: Sources, folder: Path, where: str) -> None:
    """Copy all bytes into `folder`/weights.data and point the tensors there. Constant memory.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    done: dict[Span, int] = {}
    total = sum(span.length for span in {s for _, s in sources.spans})
    if total + (1 << 20) > shutil.disk_usage(folder).free:
        raise OutputError(
            f"no room for a private copy of {total / 1e6:.2f} MB", str(folder), "set TMPDIR to a larger disk"
        )
    try:
        with (folder / DATA_FILE).open("wb") as out:
            for tensor, span in sources.spans:
                if span not in done:
                    out.seek(-(-out.tell() // _ALIGNMENT) * _ALIGNMENT)
                    done[span] = out.tell()
                    note = _copy_span(span, out.fileno(), done[span], _float_type(tensor), where)
                    if note:
                        sources.notes[tensor.name] = note
                    out.seek(done[span] + span.length)
                _point(tensor, {"location": DATA_FILE, "offset": str(done[span]), "length": str(span.length)})
            out.truncate()
    except OSError as error:
        raise OutputError(f"cannot copy the model's weights ({error.strerror})", str(folder)) from error


def _point(tensor: onnx.TensorProto, entries: Mapping[str, str]) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _float_type(tensor: onnx.TensorProto) -> npt.DTypeLike | None:
    dtype = ir.DataType(tensor.data_type)
    return dtype.numpy() if dtype.is_floating_point() and dtype.bitwidth >= 16 else None


def _copy_span(span: Span, out: int, position: int, dtype: npt.DTypeLike | None, where: str) -> str:
    """Copy, and say whether there is "nan" or "inf" among the values."""
    note = ""
    with span.path.open("rb", buffering=0) as source:
        source.seek(span.offset)
        left = span.length
        while left:
            chunk = source.read(min(_CHUNK, left))
            if not chunk or (dtype is not None and len(chunk) % np.dtype(dtype).itemsize):
                raise BadModel(f"'{span.path.name}' became shorter while it was read", where)
            os.pwrite(out, chunk, position)
            position, left = position + len(chunk), left - len(chunk)
            if dtype is not None and note != "nan":
                note = non_finite(np.frombuffer(chunk, dtype)) or note
    return note


def non_finite(values: npt.NDArray[np.generic]) -> str:
    """Say "nan", "inf" or nothing about an array of floats."""
    if np.isfinite(values).all():
        return ""
    return "nan" if np.isnan(values).any() else "inf"
