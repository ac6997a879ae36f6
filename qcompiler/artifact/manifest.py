"""manifest.json: what an artifact is, how it was made, and the hashes of its files.

Keys (schema 1): kind, schema, qcompiler, name, target, budget, keep, seed, activations, pipeline (TOML), original
{path, sha256, bytes}, calibration {source, fingerprint, samples, held_back, synthetic}, inputs and outputs [{name,
dtype, shape}], plan, bits_per_weight, uncounted [{where, reason, bytes}], stored_bytes, fp32_bytes, sizes,
predicted_loss, realised_loss, lower_bound, gap, fidelity, output_kinds {name: kind}, tolerance {relative, reason,
noise, rule}, verification [see `agreement.Agreement`], facts, passes, seconds, peak_rss_bytes, files {name: {bytes,
sha256}}, digest (SHA-256 of all other keys).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qcompiler.errors import BadModel

MANIFEST = "manifest.json"
REFERENCE = "model.onnx"
REPORT = "report.html"
KIND = "qcompiler artifact"
SCHEMA = 1
# What whoever opens an artifact relies on: a type, None for "or nothing", [form] and {str: form} for any number of
# entries of a form, {"key": form} for these keys and others.
_ARRAY = {"name": str, "dtype": str, "shape": list}
_FORMS: dict[str, Any] = {
    "target": str,
    "seed": int,
    "pipeline": str,
    "inputs": [_ARRAY],
    "outputs": [_ARRAY],
    "files": {str: {"bytes": int, "sha256": str}},
    "output_kinds": (None, {str: str}),
    "original": (None, {"path": str, "sha256": str}),
    "calibration": {"kind": str, "fingerprint": str, "path": (None, str), "tokenizer": (None, str)},
}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and hash of every file of an artifact, except its manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Write manifest.json for the files that are in the folder now; return it whole."""
    manifest = {"kind": KIND, "schema": SCHEMA, **entries, "files": file_table(folder)}
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", "utf-8")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the digest itself, so that an edit by hand is noticed."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json.

    Raises:
        BadModel: there is none, it is not ours, it was written by a later version, or it was tampered with.
    """
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadModel("not a folder that qcompile wrote", str(folder), "give the OUT of a compile") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"the manifest cannot be read ({error})", str(path), "compile again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:  # type: ignore[reportUnknownMemberType]
        raise BadModel("not a folder that qcompile wrote", str(folder), "give the OUT of a compile")
    if manifest.get("schema") != SCHEMA:  # type: ignore[reportUnknownMemberType]
        fix = "use the version of qcompiler that wrote it, or compile again"
        schema = f"its manifest has schema {manifest.get('schema')!r}, this version reads {SCHEMA}"  # type: ignore[reportUnknownMemberType]
        raise BadModel(schema, str(folder), fix)
    if (wrong := next((key for key, form in _FORMS.items() if not _has(manifest.get(key), form)), None)) is not None:  # type: ignore[reportUnknownMemberType]
        raise BadModel(f"the manifest has no valid entry '{wrong}'", str(path), "compile again")
    if not all(_is_inside(name) for name in manifest["files"]) or REFERENCE not in manifest["files"]:  # type: ignore[reportUnknownVariableType]
        raise BadModel("the manifest names files that are not those of an artifact", str(path), "compile again")
    if manifest.get("digest") != _digest(manifest):  # type: ignore[reportUnknownMemberType,reportUnknownArgumentType]
        raise BadModel("the manifest was changed after compilation", str(path), "compile again")
    return manifest  # type: ignore[reportUnknownVariableType]


def _has(value: Any, form: Any) -> bool:
    """Whether a value out of JSON has a form (see `_FORMS`)."""
    if form is None:
        return value is None
    if isinstance(form, type):
        return isinstance(value, form)
    if isinstance(form, tuple):
        return any(_has(value, one) for one in form)  # type: ignore[reportUnknownVariableType]
    if isinstance(form, list):
        return isinstance(value, list) and all(_has(item, form[0]) for item in value)  # type: ignore[reportUnknownVariableType]
    if str in form:
        return isinstance(value, dict) and all(_has(item, form[str]) for item in value.values())  # type: ignore[reportUnknownVariableType]
    return isinstance(value, dict) and all(_has(value.get(key), one) for key, one in form.items())  # type: ignore[reportUnknownVariableType,reportUnknownMemberType]


def _is_inside(name: str) -> bool:
    """Whether a file name stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
