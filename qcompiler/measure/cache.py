"""A content-addressed store for long measurements, so that a killed run continues and a repeated one is quick.

Keys are hashes of everything that a result depends on (`Cache.key`, `fingerprint`), so an entry is never stale.
Entries are .npz files without pickles, written beside their place and renamed: a reader sees a whole entry or
none, and whatever cannot be read counts as absent.
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import OutputError

Arrays = Mapping[str, npt.NDArray[Any]]
_ABANDONED = 3600.0  # seconds after which a file that is still being written belongs to a process that was killed


class Cache:
    """Arrays by key in a folder, which is made when first written to.

    Args:
        folder: where the entries live; several processes may share it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._swept = False

    @staticmethod
    def key(*parts: object) -> str:
        """A name for what was made from `parts`: strings, numbers, arrays, tensors, None, or sequences of them.

        Anything else enters by its `str`, which must then say all that matters (as a QuantSpec's does).
        """
        digest = hashlib.blake2b(digest_size=20)
        for part in parts:
            _feed(digest, part)
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays put under `key`, or None if there are none or they cannot be read."""
        try:
            with np.load(self._path(key), allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def put(self, key: str, arrays: Arrays) -> None:
        """Store arrays of plain numpy types under `key`, replacing what was there.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = self._path(key)
        temporary: Path | None = None
        self._sweep()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
                temporary = Path(file.name)
                np.savez(file, allow_pickle=False, **dict(arrays))
            temporary.replace(path)
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            fix = "free some room, set QCOMPILER_CACHE to another folder, or give --no-resume"
            raise OutputError(f"cannot be written ({reason})", f"cache {self.folder}", fix) from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Once, remove what killed processes left half-written."""
        if self._swept:
            return
        self._swept = True
        for part in self.folder.glob("*/*.part"):
            with suppress(OSError):  # another process may have removed it
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.npz"


def fingerprint(model: ir.Model) -> str:
    """A hash of everything that decides what a model computes: structure, attributes, weights.

    Names of nodes, documentation and metadata do not count; names of values do, since results are kept by them.
    Each weight's bytes are read once (about 1 s a GB).
    """
    digest = hashlib.blake2b(digest_size=20)
    for function in (*sorted(model.functions.items()),):
        _feed(digest, str(function[0]))
        _feed_nodes(digest, function[1])
        _feed(digest, [value.name for value in (*function[1].inputs, *function[1].outputs)])
    _feed(digest, sorted(f"{domain}:{version}" for domain, version in model.opset_imports.items()))
    _feed_graph(digest, model.graph)
    return digest.hexdigest()


def _feed_graph(digest: Any, graph: ir.Graph) -> None:
    _feed(digest, [f"{value.name}:{value.dtype}:{value.shape}" for value in graph.inputs])
    _feed(digest, [value.name for value in graph.outputs])
    for name, value in sorted(graph.initializers.items()):
        _feed(digest, name)
        _feed(digest, value.const_value)
    _feed_nodes(digest, graph)


def _feed_nodes(digest: Any, nodes: ir.Graph | ir.Function) -> None:
    for node in nodes:
        _feed(digest, [node.domain, node.op_type, node.overload])
        _feed(digest, [None if value is None else value.name for value in node.inputs])
        _feed(digest, [value.name for value in node.outputs])
        for name, attribute in sorted(node.attributes.items()):
            _feed(digest, name)
            for graph in _graphs_of(attribute):
                _feed_graph(digest, graph)
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                _feed(digest, attribute.as_tensor())
            elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                _feed(digest, f"{attribute.type}:{attribute.ref_attr_name}:{attribute.value}")


def _graphs_of(attribute: ir.Attr) -> Iterator[ir.Graph]:
    if attribute.is_ref():
        return
    if attribute.type == ir.AttributeType.GRAPH:
        yield attribute.as_graph()
    elif attribute.type == ir.AttributeType.GRAPHS:
        yield from attribute.as_graphs()


def _feed(digest: Any, part: object) -> None:
    """Add one part, with its type and length, so that no two different lists of parts look alike."""
    if isinstance(part, np.ndarray):
        _feed(digest, f"array {part.dtype.str} {part.shape}")
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    elif isinstance(part, ir.TensorProtocol):
        _feed(digest, f"tensor {part.dtype} {part.shape}")
        digest.update(_tensor_bytes(part))
    elif isinstance(part, list | tuple):
        _feed(digest, f"list {len(part)}")  # type: ignore[reportUnknownArgumentType]
        for item in part:  # type: ignore[reportUnknownVariableType]
            _feed(digest, item)
    elif isinstance(part, bytes | bytearray | memoryview):
        digest.update(f"bytes {len(part)};".encode())
        digest.update(part)
    else:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(f"{len(text)};".encode() + text)


def _tensor_bytes(tensor: ir.TensorProtocol) -> Any:
    """The bytes of a tensor, without a copy where it lies in memory (or in a mapped file) as an array."""
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    array = tensor.numpy()
    if tensor.dtype.bitwidth >= 8 and array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8).data
    return tensor.tobytes()
