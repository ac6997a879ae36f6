"""Reading .npz and .npy files that may be broken or hostile: sizes first, no pickles, memory maps where possible."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import psutil

from qcompiler.errors import BadData

Array = npt.NDArray[Any]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_MAX_ARRAYS = 1024
# What zipfile and numpy raise on damaged, encrypted or exotic archives.
_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def is_images(folder: Path) -> bool:
    """Whether a folder holds images, in sub-folders too."""
    return bool(image_files(folder))


def image_files(folder: Path) -> list[Path]:
    """All images under a folder, sorted by path; hidden files are no images."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def read_npy(path: Path) -> Array:
    """A memory-mapped .npy file.

    Raises:
        BadData: not such a file, cut off, or full of Python objects.
    """
    try:
        with path.open("rb") as file:
            shape, dtype, _ = _header(file, str(path))
            present = path.stat().st_size - file.tell()
        _check_length(math.prod(shape) * dtype.itemsize, present, str(path))
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadData(f"cannot be read as .npy ({error})", str(path)) from error


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file. Uncompressed members are memory-mapped, others loaded.

    Raises:
        BadData: not such a file, cut off, full of Python objects, or larger than half of the free memory.
    """
    where = str(path)
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            if not members or len(members) > _MAX_ARRAYS:
                raise BadData(f"holds {len(members)} arrays", where, "save it with numpy.savez")
            room = psutil.virtual_memory().available // 2
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise BadData(f"holds '{name}' twice", where)
                arrays[name] = _member(path, archive, member, room)
                room -= 0 if isinstance(arrays[name], np.memmap) else arrays[name].nbytes
    except _BROKEN as error:
        raise BadData(f"cannot be read as .npz ({error})", where, "save it with numpy.savez") from error
    return arrays


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, room: int) -> Array:
    where = f"{path}, '{member.filename}'"
    with archive.open(member) as file:
        shape, dtype, fortran = _header(file, where)
        size = math.prod(shape) * dtype.itemsize
        _check_length(size, member.file_size - file.tell(), where)
        if member.compress_type == zipfile.ZIP_STORED and size:
            start = _data_offset(path, member) + file.tell()
            return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
        if size > room:
            raise BadData(f"needs {size / 1e9:.1f} GB of memory", where, "save it uncompressed (numpy.savez)")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise BadData("holds Python objects", where, "save arrays of numbers")
    if any(d < 0 for d in shape):
        raise BadData(f"declares the shape {shape}", where)
    return shape, dtype, fortran


def _check_length(needed: int, present: int, where: str) -> None:
    if needed != present:
        raise BadData(f"declares {needed} bytes of data but has {present}", where, "copy or save the file again")


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header."""
    with path.open("rb") as raw:
        raw.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", raw.read(4))
    return member.header_offset + 30 + name + extra
