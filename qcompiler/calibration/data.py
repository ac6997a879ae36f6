"""`Calibration`: samples, wherever they come from, served in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.files import is_images, read_npy, read_npz
from qcompiler.calibration.images import ImageRows
from qcompiler.calibration.synthetic import synthetic_feeds
from qcompiler.calibration.text import token_windows
from qcompiler.calibration.validate import Block, Rows, feeds_check
from qcompiler.errors import BadData, BadOption

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
_HASH_BYTES = 1 << 26


@dataclass(frozen=True)
class Calibration:
    """Data for one model's inputs, already checked against them.

        >>> data = Calibration.from_path(Path("calib.npz"), model.ir)      # doctest: +SKIP
        >>> for feeds in data.batches(8, limit=64):                        # doctest: +SKIP
        ...     session(feeds)

    Attributes:
        blocks: samples that can share a batch; more than one only where shapes differ between samples.
        source: where they come from, for reports.
        warning: one line for the user, or "".
        synthetic: made up, not given.
    """

    blocks: tuple[Block, ...]
    source: str = "arrays"
    warning: str = ""
    synthetic: bool = False

    @staticmethod
    def from_path(
        path: Path, model: ir.Model, preprocess: str | None = None, tokenizer: Path | None = None
    ) -> Calibration:
        """Read .npz (arrays named as the inputs), .npy (one input), a folder of images, or a text file.

        Args:
            path: the data.
            model: whose inputs it is for.
            preprocess: how images become the input, see `qcompiler.preprocess`.
            tokenizer: a tokenizer.json, needed for text.

        Raises:
            BadData: what is wrong with the data, where, and what the model wants.
            BadOption: `preprocess` or `tokenizer` is given, and this data has no use for it.
        """
        path, where = Path(path), str(path)
        if not path.exists():
            raise BadData("no such file or folder", where, "check the path")
        if preprocess is not None and not path.is_dir():
            raise BadOption("it is for folders of images", f"--preprocess, with {where}", "drop it")
        if tokenizer is not None and (path.is_dir() or path.suffix in (".npz", ".npy")):
            raise BadOption("it is for text files", f"--tokenizer, with {where}", "drop it")
        if path.is_dir():
            if not is_images(path):
                raise BadData("the folder holds no images", where, "give .png, .jpg, .bmp or .webp files, or .npz data")
            return Calibration.from_arrays(ImageRows.for_input(path, model, preprocess), model, where)
        if path.suffix == ".npz":
            return Calibration.from_arrays(read_npz(path), model, where)
        if path.suffix == ".npy":
            inputs = [str(v.name) for v in model.graph.inputs]
            if len(inputs) != 1:
                raise BadData(
                    f"a .npy file holds one array, the model has the inputs {', '.join(inputs)}", where, "use .npz"
                )
            return Calibration.from_arrays({inputs[0]: read_npy(path)}, model, where)
        if tokenizer is None:
            raise BadData(
                "is neither .npz, .npy nor a folder of images", where, "for a text file give --tokenizer tokenizer.json"
            )
        return Calibration.from_arrays(token_windows(path, tokenizer, model), model, where)

    @staticmethod
    def from_arrays(arrays: Mapping[str, Rows], model: ir.Model, source: str = "arrays") -> Calibration:
        """Arrays in memory, memory-mapped or lazy; see `qcompiler.calibration.validate` for the layouts."""
        return Calibration((feeds_check(model, arrays, source),), source)

    @staticmethod
    def from_iterable(items: Iterable[Any], model: ir.Model, source: str = "iterable") -> Calibration:
        """Any iterable of batches: mappings by input name, sequences in the inputs' order, or single arrays.

        Everything numpy can convert is accepted, so are torch's CPU tensors. Batches whose shapes agree are
        joined, others stay apart.
        """
        names = [str(v.name) for v in model.graph.inputs]
        groups: dict[tuple[Any, ...], list[Feeds]] = {}
        for index, item in enumerate(items):
            feeds = _feeds(item, names, f"{source}, item {index}")
            groups.setdefault(tuple(_kind(k, v) for k, v in feeds.items()), []).append(feeds)
        if not groups:
            raise BadData("holds no samples", source, "give at least one batch")
        blocks: list[Block] = []
        for group in groups.values():
            parts = [feeds_check(model, feeds, source) for feeds in group]
            if parts[0].layout == "single":
                blocks += parts
                continue
            merged = {k: np.concatenate([f[k] for f in group]) if v.ndim else v for k, v in group[0].items()}
            blocks.append(feeds_check(model, merged, source))
        return Calibration(tuple(blocks), source)

    @staticmethod
    def synthetic_for(model: ir.Model, samples: int = 32, seed: int = 0, *, text: bool = True) -> Calibration:
        """Made-up inputs for a model without data; see `qcompiler.calibration.synthetic`.

        Args:
            model: whose inputs are made.
            samples: how many.
            seed: same seed, same data.
            text: let a causal language model write its own text (which takes as long as reading 8000 tokens);
                random tokens otherwise.
        """
        calls, kind = synthetic_feeds(model, samples, seed, text=text)
        made = Calibration.from_iterable(calls, model, "synthetic")
        return replace(made, synthetic=True, warning=f"no calibration data: using {kind}; expect lower accuracy")

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(block.count for block in self.blocks)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, shapes, types and contents: equal for equal data from any source."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for name, number in sorted(block.shared.items()):
                digest.update(f"{name} {number.item()} {block.dtypes[name]} shared".encode())
            for name in sorted(block.arrays):
                rows = block.arrays[name]
                shape = (block.count, *rows.shape[1:]) if block.layout != "single" else rows.shape
                digest.update(f"{name} {shape} {block.dtypes[name]} {block.layout}".encode())
                for start in range(0, shape[0], step := _rows_in(_HASH_BYTES, rows)):
                    digest.update(np.ascontiguousarray(rows[start : min(start + step, shape[0])]).tobytes())
        return digest.hexdigest()

    def batches(self, size: int, limit: int | None = None) -> Iterator[Feeds]:
        """Feeds for successive calls, in the order of the data.

        Args:
            size: samples in a batch at most. A model that fixes its first dimension gets that many instead,
                the last batch filled up by repeating a sample. Stacked data gives one sample a batch.
            limit: stop after this many samples.
        """
        left = self.count if limit is None else min(limit, self.count)
        for block in self.blocks:
            if left <= 0:
                return
            end = min(left, block.count)
            width = block.step or (1 if block.layout != "batched" else max(1, size))
            for start in range(0, end, width):
                yield block.feeds(start, start + width if block.step else min(start + width, end))
            left -= end

    def take(self, count: int) -> Calibration:
        """The first samples."""
        return self.part(0, count)

    def part(self, start: int, stop: int) -> Calibration:
        """Samples start to stop, in the order of the data."""
        kept: list[Block] = []
        for block in self.blocks:
            low, high = max(start, 0), min(stop, block.count)
            start, stop = start - block.count, stop - block.count
            if low < high and block.layout == "single":
                kept.append(block)
            elif low < high:
                arrays = {k: _View(v, low, high) for k, v in block.arrays.items()}
                kept.append(replace(block, arrays=arrays, count=high - low))
        return replace(self, blocks=tuple(kept))

    def spread(self, count: int) -> Calibration:
        """At most `count` samples, evenly spread over the data: first and last are among them."""
        return self if count >= self.count else self._pick(self._spread(count))

    def without_spread(self, count: int) -> Calibration:
        """The samples that `spread(count)` leaves out."""
        return self._pick(np.setdiff1d(np.arange(self.count), self._spread(count)))

    def _spread(self, count: int) -> npt.NDArray[np.int_]:
        return np.linspace(0, self.count - 1, max(min(count, self.count), 1)).round().astype(int)

    def _pick(self, chosen: npt.NDArray[np.int_]) -> Calibration:
        kept: list[Block] = []
        for block in self.blocks:
            here = tuple(int(i) for i in chosen if 0 <= i < block.count)
            chosen = chosen - block.count
            if here and block.layout == "single":
                kept.append(block)
            elif here:
                arrays = {k: _Picked(v, here) for k, v in block.arrays.items()}
                kept.append(replace(block, arrays=arrays, count=len(here)))
        return replace(self, blocks=tuple(kept))


@dataclass(frozen=True)
class _View:
    """Some rows of an array, read when needed."""

    rows: Rows
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.rows.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.rows.dtype

    def __getitem__(self, key: slice, /) -> Array:
        start, stop, _ = key.indices(self.stop - self.start)
        return np.asarray(self.rows[self.start + start : self.start + stop])


@dataclass(frozen=True)
class _Picked:
    """Single rows of an array, read when needed."""

    rows: Rows
    chosen: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.chosen), *self.rows.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.rows.dtype

    def __getitem__(self, key: slice, /) -> Array:
        parts = [np.asarray(self.rows[i : i + 1]) for i in self.chosen[key]]
        return np.concatenate(parts) if parts else np.empty((0, *self.rows.shape[1:]), self.dtype)


def _rows_in(limit: int, rows: Rows) -> int:
    return max(1, limit // max(1, rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))))


def _kind(name: str, array: Array) -> tuple[Any, ...]:
    """What two arrays must have in common to be joined: all but the number of samples; for a number, its value."""
    return name, array.shape[1:], str(array.dtype), None if array.ndim else array.item()


def _feeds(item: Any, names: Sequence[str], where: str) -> Feeds:
    """One item of an iterable as arrays by name."""
    if isinstance(item, Mapping):
        pairs = [(str(k), v) for k, v in item.items()]  # type: ignore[reportUnknownVariableType]
    elif isinstance(item, list | tuple):
        if len(item) != len(names):  # type: ignore[reportUnknownArgumentType]
            raise BadData(f"has {len(item)} arrays", where, f"the model's inputs are {', '.join(names)}")  # type: ignore[reportUnknownArgumentType]
        pairs = list(zip(names, item, strict=True))  # type: ignore[reportUnknownArgumentType]
    else:
        pairs = [(names[0], item)]
    arrays = {name: np.asarray(value) for name, value in pairs}
    for name, array in arrays.items():
        if array.dtype.kind not in "biufV":
            raise BadData(f"'{name}' is no array of numbers ({array.dtype})", where)
    return arrays
