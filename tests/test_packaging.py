"""The wheel holds all four code folders, and the copies at the top level refuse to be imported."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, files):
        path, target = ROOT / name.decode(), source / name.decode()
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_file():
            target.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if "BackendUnavailable" in done.stderr or "No module named 'setuptools" in done.stderr:
        command.remove("--no-build-isolation")
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_the_four_folders(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("qcompiler/passes/__init__.py", "qcompiler/backends/__init__.py", "qcompiler/solvers/__init__.py",
                   "qcompiler/py.typed", "qcompiler/passes/round/gptq.py"):  # fmt: skip
        assert needed in names
    assert any(n.startswith("qcompiler/passes/recipes/") and n.endswith(".toml") for n in names)


def test_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import qcompiler.passes, qcompiler.backends, qcompiler.solvers as s; print(s.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize("package", ["passes", "backends", "solvers"])
def test_second_copy_is_refused(package: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"import qcompiler.{package}" in done.stderr
