"""A compiled folder, opened again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import registry
from qcompiler.artifact.manifest import MANIFEST, REFERENCE, REPORT, read_manifest, sha256
from qcompiler.errors import BadData, BadModel, QcompilerError
from qcompiler.target import Backend, Feeds, Outputs, Runnable


@dataclass(frozen=True)
class Artifact:
    """A compiled model.

    Attributes:
        folder: where it lies.
        manifest: manifest.json; its keys are listed in `artifact.manifest`.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def reference(self) -> Path:
        """The QDQ model, whose meaning is normative for the target's files."""
        return self.folder / REFERENCE

    @cached_property
    def runnable(self) -> Runnable:
        """The target's own form, loaded at first use."""
        backend: Backend = registry.find("backends", self.manifest["target"])()
        return backend.load(self.folder)

    def run(self, feeds: Feeds) -> Outputs:
        """All outputs, by name, for one batch of inputs by name.

        Raises:
            BadData: inputs are missing, unknown, or of the wrong type or rank, or the model refuses them (an index
                outside a table).
        """
        _check_feeds(feeds, self.manifest["inputs"])
        runnable = self.runnable
        try:
            return runnable.run(feeds)
        except QcompilerError:
            raise
        except Exception as error:  # the runtimes raise classes of their own that share no base
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason")
            raise BadData(f"the compiled model cannot take this input ({reason[:300]})", str(self.folder)) from error


def is_artifact(path: Path) -> bool:
    """Whether a folder looks like one of ours."""
    return (path / MANIFEST).is_file()


def load_artifact(folder: Path | str) -> Artifact:
    """Open a compiled folder after checking that its files are those that were written; the report may be gone.

    Raises:
        BadModel: it is not an artifact, or a file is missing or was changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            if name == REPORT:
                continue
            raise BadModel(f"the file {name} is missing", str(folder), "compile again")
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise BadModel(f"the file {name} was changed after compilation", str(folder), "compile again")
    return Artifact(folder, manifest)


def _check_feeds(feeds: Feeds, inputs: list[dict[str, Any]]) -> None:
    wanted = {entry["name"]: entry for entry in inputs}
    for name in feeds:
        if name not in wanted:
            raise BadData("the model has no such input", f"input '{name}'", f"it has {', '.join(wanted)}")
    for name, entry in wanted.items():
        if name not in feeds:
            raise BadData("the input is missing", f"input '{name}'", f"give {entry['dtype']} {entry['shape']}")
        array, shape = np.asarray(feeds[name]), entry["shape"]
        fits = array.ndim == len(shape) and all(
            not isinstance(d, int) or d == n for d, n in zip(shape, array.shape, strict=False)
        )
        if array.dtype.name != entry["dtype"] or not fits:
            what = f"{array.dtype.name} {list(array.shape)} does not fit {entry['dtype']} {shape}"
            raise BadData(what, f"input '{name}'", "give arrays as the model declares them")
