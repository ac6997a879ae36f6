"""Problems as files: one .npz that numpy reads without this package, and that is read without trusting it.

The arrays lie in the archive uncompressed, so what a file makes us allocate is bounded by its own size; names, kinds
and the format's version are JSON (ASCII, bytes in an array). Nothing in a file is code: there are no pickles.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from scipy import sparse

from qcompiler.solvers.problem import Problem

_VERSION = 1
_DTYPES = {np.dtype(t) for t in (np.float64, np.int64, np.int32, np.uint8)}
_BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, KeyError, TypeError, OverflowError, OSError)

Arrays = dict[str, npt.NDArray[Any]]


def save_problem(problem: Problem, path: str | Path) -> None:
    """Write a problem, all or nothing: `path` is replaced when the file is complete.

    Raises OSError where it cannot be written.
    """
    path = Path(path)
    names = list(problem.costs)
    header = {
        "version": _VERSION,
        "resources": names,
        "budgets": [names.index(name) for name in problem.budgets],
        "pairs": [names.index(name) for name in problem.pair_costs],
        "cross": "none" if problem.cross is None else "dense" if isinstance(problem.cross, np.ndarray) else "sparse",
    }
    arrays: Arrays = {
        "header": np.frombuffer(json.dumps(header).encode("ascii"), np.uint8),
        "loss": problem.loss,
        "budgets": np.array(list(problem.budgets.values()), np.float64),
        "tie_sizes": np.array([len(group) for group in problem.ties], np.int64),
        "tie_units": np.array([unit for group in problem.ties for unit in group], np.int64),
    }
    arrays |= {f"cost_{i}": problem.costs[name] for i, name in enumerate(names)}
    for i, name in enumerate(problem.pair_costs):
        arrays |= _of_matrix(f"pair_{i}", problem.pair_costs[name])
    if problem.cross is not None:
        arrays |= _of_matrix("cross", problem.cross)
    _write(path, arrays)


def load_problem(path: str | Path) -> Problem:
    """Read what `save_problem` wrote.

    Raises:
        ValueError: what is wrong with a file that is none: text, cut off, inconsistent, hostile. Sizes are checked
            before anything of that size is allocated.
        OSError: the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            return _problem(_read(file))
        except _BROKEN as error:
            raise ValueError(f"{path} is not a problem file: {error or type(error).__name__}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a problem file: {error}") from error


def _of_matrix(name: str, matrix: Any) -> Arrays:
    if isinstance(matrix, np.ndarray):
        return {name: matrix}
    return {
        f"{name}_values": matrix.data,
        f"{name}_columns": matrix.indices.astype(np.int64),
        f"{name}_rows": matrix.indptr.astype(np.int64),
    }


def _write(path: Path, arrays: Arrays) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            cast(Any, np.savez)(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # temporary files are private; this one becomes an ordinary file
        temporary.replace(path)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(file: Any) -> Arrays:
    """The arrays of an archive whose members are stored as they are and do not overlap."""
    size = file.seek(0, os.SEEK_END)
    arrays: Arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise ValueError("its arrays are compressed")
        if sum(m.file_size for m in members) > size:
            raise ValueError("its arrays are larger than the file")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"array '{name}' is there twice")
            arrays[name] = _array(name, archive.read(member))
    return arrays


def _array(name: str, data: bytes) -> npt.NDArray[Any]:
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array '{name}' has version {version}")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    count = 1
    for extent in shape:  # Python integers: no product overflows
        count *= extent
    if dtype not in _DTYPES or any(extent < 0 for extent in shape):
        raise ValueError(f"array '{name}' is {dtype} {shape}")
    if count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"array '{name}' of shape {shape} does not have the size that it claims")
    values = np.frombuffer(data, dtype, count, stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _problem(arrays: Arrays) -> Problem:
    header = _header(arrays)
    names, used = header["resources"], {"header"}

    def take(name: str, dtype: Any, dimensions: int) -> npt.NDArray[Any]:
        found = arrays.get(name)
        if found is None or found.dtype != np.dtype(dtype) or found.ndim != dimensions:
            raise ValueError(f"array '{name}' is missing, or not {dimensions}-dimensional {np.dtype(dtype)}")
        used.add(name)
        return found

    def matrix(name: str, size: int) -> Any:
        values, columns = take(f"{name}_values", np.float64, 1), take(f"{name}_columns", np.int64, 1)
        rows = take(f"{name}_rows", np.int64, 1)
        if len(rows) != size + 1:
            raise ValueError(f"'{name}' has {len(rows) - 1} rows, not {size}")
        found = sparse.csr_array((values, columns, rows), shape=(size, size))
        found.check_format(full_check=True)
        return found

    loss = take("loss", np.float64, 2)
    if len(loss) and not loss.size:
        raise ValueError("unit 0 has no option")
    costs = {name: take(f"cost_{i}", np.float64, 2) for i, name in enumerate(names)}
    amounts = take("budgets", np.float64, 1)
    if len(amounts) != len(header["budgets"]):
        raise ValueError(f"{len(amounts)} amounts for {len(header['budgets'])} budgets")
    budgets = {names[i]: float(amount) for i, amount in zip(header["budgets"], amounts, strict=True)}
    ties = _ties(take("tie_sizes", np.int64, 1), take("tie_units", np.int64, 1))
    pairs = {names[i]: matrix(f"pair_{k}", loss.size) for k, i in enumerate(header["pairs"])}
    cross = None
    if header["cross"] != "none":
        cross = take("cross", np.float64, 2) if header["cross"] == "dense" else matrix("cross", loss.size)
    if spare := sorted(set(arrays) - used):
        raise ValueError(f"array '{spare[0]}' belongs to nothing")
    return Problem(loss, costs, budgets, ties, cross, pairs)


def _header(arrays: Arrays) -> Mapping[str, Any]:
    """The header, checked: its lists are lists of what they should be, its indices name resources."""
    raw = arrays.get("header")
    if raw is None or raw.dtype != np.uint8:
        raise ValueError("it has no header")
    try:
        header = json.loads(raw.tobytes())
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    if not isinstance(header, dict) or set(cast(Any, header)) != {"version", "resources", "budgets", "pairs", "cross"}:
        raise ValueError("its header does not have the fields of a problem")
    found = cast(dict[str, Any], header)
    if found["version"] != _VERSION:
        raise ValueError(f"its version is {found['version']!r}, and this package reads {_VERSION}")
    names = found["resources"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        raise ValueError("its resources are not names")
    count = len(set(cast(list[str], names)))
    if count != len(cast(list[str], names)):
        raise ValueError("a resource is there twice")
    for field in ("budgets", "pairs"):
        indices = found[field]
        if not isinstance(indices, list) or not all(
            type(i) is int and 0 <= i < count for i in cast(list[Any], indices)
        ):
            raise ValueError(f"its {field} are not indices of resources")
        if len(set(cast(list[int], indices))) != len(cast(list[int], indices)):
            raise ValueError(f"a resource has two {field}")
    if found["cross"] not in ("none", "dense", "sparse"):
        raise ValueError(f"cross is {found['cross']!r}")
    return found


def _ties(sizes: npt.NDArray[Any], units: npt.NDArray[Any]) -> tuple[tuple[int, ...], ...]:
    if (sizes < 0).any() or sum(sizes.tolist()) != len(units):
        raise ValueError("the sizes of the ties do not match their units")
    stops = np.cumsum(sizes)
    return tuple(tuple(units[stop - size : stop].tolist()) for stop, size in zip(stops, sizes, strict=True))
