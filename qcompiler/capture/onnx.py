"""ONNX files: checked before they are trusted, copied to a private folder, normalised.

check_file(path)    is this a model that can be compiled, and is it safe to touch?
load_onnx(path)     the same, then a `Model` whose weights are memory-mapped from a private copy
"""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qcompiler.capture import tensors, wire
from qcompiler.capture.check import check_structure
from qcompiler.capture.normalize import normalize, root_cause
from qcompiler.errors import BadModel
from qcompiler.folders import claim
from qcompiler.model import Model

__all__ = ["PrivateFolder", "check_file", "load_onnx", "normalize"]

PROTO_LIMIT = 2**31 - 1  # bytes: no protobuf message may be larger
_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")


class PrivateFolder(type(Path())):
    """A temporary folder that goes away with the last model that refers to it, or with the process."""

    @staticmethod
    def make() -> PrivateFolder:
        """A new folder that only this user can read."""
        made, release = claim("model")
        folder = PrivateFolder(made)
        weakref.finalize(folder, release)
        return folder


def check_file(path: Path) -> None:
    """Check an ONNX file and its external data without loading weights.

    Raises:
        BadModel: says what is wrong, where, and what to do.
    """
    _inspect(Path(path))


def load_onnx(path: Path, workdir: Path | None = None) -> Model:
    """Read an ONNX file into a normalised `Model`.

    The file and its external data are checked, then copied: weights go to one data file in `workdir`, from
    where they are memory-mapped when needed. Memory stays far below the size of the model.

    Args:
        path: an ONNX file, opset 11 to 26, external data beside it.
        workdir: an existing folder for the copy, owned by the caller; by default a private temporary
            folder that is removed when the last `Model` that uses it is gone.

    Raises:
        BadModel: the file is broken, hostile or unsupported, or a weight is not finite.
        OutputError: no room for the copy.
    """
    path = Path(path)
    folder = workdir or PrivateFolder.make()
    proto, sources = _inspect(path)
    tensors.copy_data(sources, folder, str(path))
    skeleton = folder / "captured.onnx"
    skeleton.write_bytes(proto.SerializeToString())
    del proto, sources.spans[:]
    try:
        captured = ir.load(skeleton)
    except Exception as error:  # onnx_ir raises what its enums and decoders raise
        raise BadModel(f"holds an invalid operation or type ({root_cause(error)})", str(path)) from error
    _check_finite(captured, sources.notes, str(path))
    captured = normalize(captured, str(path))
    _check_interface(captured, str(path))
    captured.meta["file"] = str(path)  # for messages
    captured.meta["folder"] = folder  # tensors read from it as long as the graph lives
    return Model(captured, name=path.stem, workdir=folder)


def _check_interface(model: ir.Model, where: str) -> None:
    """Refuse inputs and outputs that no array of numbers can be, and inputs that hold none."""
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            plain = value.type is None or isinstance(value.type, ir.TensorType)
            if not plain or value.dtype == ir.DataType.STRING:
                what = "a text" if plain else f"a {type(value.type).__name__.removesuffix('Type').lower()}"
                fix = "export a model whose inputs and outputs are tensors of numbers"
                raise BadModel(f"{kind} '{value.name}' is {what}", where, fix)
    for value in model.graph.inputs:
        if value.shape is not None and 0 in value.shape:
            what = f"input '{value.name}' has a dimension of size 0, so that no data fits it"
            raise BadModel(what, where, "export the model with the size that it is for")


def _inspect(path: Path) -> tuple[onnx.ModelProto, tensors.Sources]:
    """The model without its large weights, and where these are; everything checked."""
    where = str(path)
    _check_size(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        _check_kind(wire.sniff(buffer[:512]), where)
        stripped = wire.strip(buffer, where)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(stripped.data)
    except DecodeError as error:
        raise BadModel("not an ONNX model: protobuf cannot read it", where) from error
    check_structure(proto, where)
    sources = _locate(proto, stripped, path)
    tensors.check_overlap(sources, where)
    return proto, sources


def _check_size(path: Path) -> None:
    where = str(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise BadModel("is a folder", where, "give the .onnx file in it")
        if not path.is_file():
            raise BadModel("is not a plain file", where)
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise BadModel("no such file", where, "check the path") from error
    except OSError as error:
        raise BadModel(f"cannot be read ({error.strerror})", where) from error
    if size == 0:
        raise BadModel("the file is empty", where, "copy or download it again")
    if size > PROTO_LIMIT:
        raise BadModel("is larger than 2 GiB, which no ONNX file may be", where, "save its weights as external data")


def _check_kind(kind: wire.Kind, where: str) -> None:
    if kind == "lfs":
        raise BadModel("is a Git LFS pointer, not the model", where, "run `git lfs pull`")
    if kind == "zip":
        raise BadModel("is a zip archive, not an ONNX model", where, "export the model to ONNX, or unpack it")
    if kind == "text":
        raise BadModel("is a text file, not an ONNX model", where)


def _locate(proto: onnx.ModelProto, stripped: wire.Stripped, path: Path) -> tensors.Sources:
    """Check the data of every tensor; return those whose bytes lie in a file."""
    sources = tensors.Sources()
    for index, tensor in enumerate(proto.graph.initializer):
        _locate_one(tensor, stripped.raw.get(index), path, sources)
    for node in (*proto.graph.node, *(n for f in proto.functions for n in f.node)):
        for tensor in tensors.node_tensors(node):
            _locate_one(tensor, None, path, sources)
    return sources


def _locate_one(tensor: onnx.TensorProto, raw: tuple[int, int] | None, path: Path, sources: tensors.Sources) -> None:
    where, real = str(path), path.resolve()
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        sources.spans.append((tensor, tensors.external_span(tensor, real.parent, where)))
    elif raw is None:
        tensors.check_inline(tensor, where)
    elif tensors.byte_size(tensor, where) != raw[1]:
        raise tensors.misfit(tensor, where)
    else:
        sources.spans.append((tensor, tensors.Span(real, *raw)))


def _check_finite(model: ir.Model, notes: dict[str, str], where: str) -> None:
    """Refuse NaN in any array of more than one value, and infinity in the weights of products.

    A causal mask is a constant full of -inf, so infinities elsewhere are the model's own business.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        note = notes.get(name, "")
        if not isinstance(tensor, ir.ExternalTensor):
            note = tensors.non_finite(tensor.numpy())
        weighs = any(n.op_type in _WEIGHTED and i == 1 for n, i in value.uses())
        if (note == "nan" and tensor.size > 1) or (note and weighs):
            kind = "NaN" if note == "nan" else "infinity"
            raise BadModel(f"weight '{name}' holds {kind}", where, "export a model whose weights are finite")
