"""The samples of a compilation: some to measure on, some held back to judge by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption
from qcompiler.measure.samples import samples_for_one
from qcompiler.model import Model
from qcompiler.progress import Progress
from qcompiler.target import Feeds

_MOST_HELD = 64  # samples
_LEAST = 4  # samples, to hold some back
FEW = 8  # verification inputs of each kind
_BATCH_BYTES = 1 << 24  # of inputs; activations are many times larger
_MOST_BATCH = 8
_OUTPUT_BYTES = 32_000_000  # of one run's outputs: a vocabulary of 50,000 makes 100 MB of a text of 512 tokens


@dataclass(frozen=True)
class Source:
    """Where calibration data comes from, so that it can be had again.

    Attributes:
        data: a path, an iterable of feeds, a `Calibration`, or None for data that the compiler makes.
        preprocess: what turns images into inputs.
        tokenizer: what turns text into inputs.
    """

    data: Calibration | Path | str | Iterable[Any] | None
    preprocess: str | None = None
    tokenizer: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """What the manifest remembers; `kind` is "path", "memory" or "made"."""
        path = str(Path(self.data).resolve()) if isinstance(self.data, str | Path) else None
        kind = "path" if path else "made" if self.data is None else "memory"
        tokenizer = None if self.tokenizer is None else str(self.tokenizer.resolve())
        return {"kind": kind, "path": path, "preprocess": self.preprocess, "tokenizer": tokenizer}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Source:
        """The inverse, for the kinds "path" and "made"."""
        tokenizer = entry["tokenizer"]
        return Source(entry["path"], entry["preprocess"], None if tokenizer is None else Path(tokenizer))


@dataclass(frozen=True)
class Samples:
    """Calibration data in its two parts.

    Attributes:
        source: where it came from.
        used: what passes may measure on.
        held: what only fidelity and verification see; the same as `used` where there are too few to spare one.
        random: inputs made at random within the inputs' types.
        batch: samples a run.
    """

    source: Source
    used: Calibration
    held: Calibration
    random: Calibration
    batch: int

    @property
    def held_back(self) -> bool:
        """Whether what is judged by was not measured on."""
        return self.held is not self.used

    def feeds(self, part: Calibration, limit: int | None = FEW) -> list[Feeds]:
        """Some samples of a part, in batches."""
        return list(part.batches(self.batch, limit))


def gather(source: Source, model: Model, seed: int, progress: Progress) -> Samples:
    """Read or make the samples and hold an eighth back, at least 2 of 4 or more, at most 64 (more rows).

    With fewer than 4 samples all of them are used and judged by, and the user is told: too few to spare one.

    Raises:
        BadData: the model cannot take them.
        BadOption: an option says how to read data that is not read.
    """
    random = Calibration.synthetic_for(model.ir, FEW, seed + 1, text=False)
    whole = _read(source, model, seed)
    if whole.warning:
        progress.note(whole.warning)
    _note_constant(whole, progress)
    count = whole.count
    if count < _LEAST:
        what = f"only {count} calibration sample{'' if count == 1 else 's'}: none is held back"
        progress.note(f"{what}, and fidelity is taken on what the compiler measured on; give {_LEAST} or more")
    together = samples_for_one(model.ir, whole)
    held = 0 if count < _LEAST else min(_MOST_HELD * together, max(2, math.ceil(count / 8)))
    used, kept = (whole.take(count - held), whole.part(count - held, count)) if held else (whole, whole)
    one = feed_bytes(next(iter(whole.batches(1, 1))))
    return Samples(source, used, kept, random, max(1, min(_MOST_BATCH * together, _BATCH_BYTES // max(one, 1))))


def _note_constant(samples: Calibration, progress: Progress) -> None:
    """Say that the first samples hold one number and nothing else, from which nothing can be learnt."""
    arrays = [array for feeds in samples.batches(_MOST_BATCH, _MOST_BATCH) for array in feeds.values()]
    if arrays and all(array.size > 1 and (array == array.flat[0]).all() for array in arrays):
        progress.note("the calibration data is the same number everywhere: expect formats and ranges that fit nothing")


def batch_for(output_bytes: int, most: int = _MOST_BATCH) -> int:
    """Samples a run that keep its outputs small.

    Args:
        output_bytes: of one sample.
        most: samples.
    """
    return max(1, min(most, _OUTPUT_BYTES // max(output_bytes, 1)))


def feed_bytes(feeds: Feeds) -> int:
    """Bytes of one batch of inputs."""
    return sum(array.nbytes for array in feeds.values())


def _read(source: Source, model: Model, seed: int) -> Calibration:
    data = source.data
    if not isinstance(data, str | Path):
        for option in ("preprocess", "tokenizer"):
            if getattr(source, option) is not None:
                raise BadOption("it is for data in files", f"--{option}", "give --calib DATA, or drop it")
    if data is None:
        return Calibration.synthetic_for(model.ir, seed=seed)
    if isinstance(data, Calibration):
        return data
    if isinstance(data, str | Path):
        return Calibration.from_path(Path(data), model.ir, source.preprocess, source.tokenizer)
    if isinstance(data, Mapping):  # one mapping of arrays, as of an .npz
        return Calibration.from_iterable([data], model.ir)
    return Calibration.from_iterable(data, model.ir)
