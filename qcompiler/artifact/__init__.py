"""The artifact: a folder with the QDQ reference, the target's files, a manifest and a report."""

from qcompiler.artifact.folder import check_output, new_folder
from qcompiler.artifact.loaded import Artifact, is_artifact, load_artifact
from qcompiler.artifact.manifest import MANIFEST, REFERENCE, REPORT, file_table, read_manifest, write_manifest
from qcompiler.artifact.reference import save_reference
from qcompiler.artifact.verify import Comparison, FreshProcess, compare

__all__ = [
    "MANIFEST", "REFERENCE", "REPORT", "Artifact", "Comparison", "FreshProcess", "check_output", "compare",
    "file_table", "is_artifact", "load_artifact", "new_folder", "read_manifest", "save_reference", "write_manifest",
]  # fmt: skip
