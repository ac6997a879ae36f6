"""The model that an artifact was made from, found again."""

from __future__ import annotations

from pathlib import Path

from qcompiler.artifact.loaded import Artifact
from qcompiler.artifact.manifest import sha256
from qcompiler.capture.onnx import load_onnx
from qcompiler.errors import BadModel
from qcompiler.model import Model


def original_path(artifact: Artifact, reference: Path | None = None) -> Path:
    """Where the original lies: `reference`, or the file that the manifest remembers, if it is still the same.

    Raises:
        BadModel: it is gone, was changed, or the model never was a file.
    """
    if reference is not None:
        return reference
    entry = artifact.manifest["original"]
    where = str(artifact.folder)
    if entry is None:
        raise BadModel("it was not made from a file", where, "give the original by --reference")
    path = Path(entry["path"])
    if not path.is_file():
        raise BadModel(f"the original {path} is gone", where, "give it by --reference")
    if sha256(path) != entry["sha256"]:
        raise BadModel(f"the original {path} was changed since", where, "give the right one by --reference")
    return path


def original_of(artifact: Artifact, reference: Path | None = None) -> Model:
    """The original as a `Model`; errors as in `original_path` and `load_onnx`.

    Raises:
        BadModel: also if its inputs or outputs are not those of the artifact.
    """
    path = original_path(artifact, reference)
    model = load_onnx(path)
    for kind, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs)):
        names, wanted = {v.name for v in values}, {entry["name"] for entry in artifact.manifest[kind]}
        if not wanted <= names:
            what = f"its {kind} are {', '.join(sorted(map(str, names)))}, not {', '.join(sorted(wanted))}"
            raise BadModel(what, str(path), "give the model that the artifact was made from")
    return model
