"""manifest.json: what an artifact is, how it was made, and the hashes of its files.

Keys (schema 1): kind, schema, qcompiler, name, target, budget, keep, seed, activations, pipeline (TOML), original
{path, sha256, bytes}, calibration {source, fingerprint, samples, held_back, synthetic}, inputs and outputs
[{name, dtype, shape}], plan, bits_per_weight, stored_bytes, fp32_bytes, sizes, predicted_loss, realised_loss,
lower_bound, gap, fidelity, tolerance {relative, reason, noise, rule}, verification [see `agreement.Agreement`], facts,
passes, seconds, peak_rss_bytes, files {name: {bytes, sha256}}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.errors import BadModel

MANIFEST = "manifest.json"
REFERENCE = "model.onnx"
REPORT = "report.html"
KIND = "qcompiler artifact"
SCHEMA = 1


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
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", "utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json.

    Raises:
        BadModel: there is none, it is not ours, or it was written by a later version.
    """
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadModel("not a folder that qcompile wrote", str(folder), "give the OUT of a compile") from error
    except (OSError, ValueError) as error:
        raise BadModel(f"the manifest cannot be read ({error})", str(path), "compile again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:  # type: ignore[reportUnknownMemberType]
        raise BadModel("not a folder that qcompile wrote", str(folder), "give the OUT of a compile")
    if manifest["schema"] != SCHEMA:
        fix = "use the version of qcompiler that wrote it, or compile again"
        raise BadModel(f"its manifest has schema {manifest['schema']}, this version reads {SCHEMA}", str(folder), fix)
    return manifest  # type: ignore[reportUnknownVariableType]
