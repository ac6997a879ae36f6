"""Temporary folders: private, removed with their owner, however that dies."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qcompiler.folders import claim, temporary_folder

HOLD = "import sys; from qcompiler.folders import claim; print(claim('test')[0], flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_block_and_is_nobody_elses(place: Path) -> None:
    def interrupted() -> None:
        with temporary_folder("test") as folder:
            assert folder.parent == place
            assert folder.stat().st_mode & 0o077 == 0
            (folder / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(place.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_uses_is_kept(place: Path) -> None:
    pytest.importorskip("fcntl")
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    held = Path(process.stdout.readline().strip())
    (held / "weights.data").touch()
    other = place / "qcompiler-of-the-user"
    other.mkdir()
    own, release = claim("test")
    with temporary_folder("test"):
        assert held.exists()
        assert own.exists()
    process.kill()
    process.communicate()
    with temporary_folder("test"):
        assert not held.exists()
        assert own.exists()
        assert other.exists()
    release()
    assert list(place.iterdir()) == [other]
