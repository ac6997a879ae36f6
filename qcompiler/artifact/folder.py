"""Write an output folder all or nothing: into a temporary sibling, renamed when complete."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qcompiler.artifact.manifest import KIND, MANIFEST
from qcompiler.errors import OutputError
from qcompiler.folders import hold, locked

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CACHE = "__pycache__"
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def check_output(out: Path) -> None:
    """See, before long work, whether `out` can be written; leaves nothing behind.

    Raises:
        OutputError: it exists and is not an artifact, or holds files beside it, or its parent cannot be written.
    """
    _refuse_foreign(out)
    place = _behind_links(out)
    _, release = hold(lambda: _temporary(place))
    release()


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends, and vanishes if it fails.

    An earlier artifact at `out` is replaced only then; a link to one stays, and what it points to is replaced.

    Raises:
        OutputError: as in `check_output`, or the disk is full.
    """
    _refuse_foreign(out)
    out = _behind_links(out)
    _remove_abandoned(out)
    folder, release = hold(lambda: _temporary(out))
    try:
        _allow_as_usual(folder)
        yield folder
        _publish(folder, out)
    except OSError as error:
        if error.errno in _FULL:
            what = f"no room left ({os.strerror(error.errno or 0).lower()})"
            raise OutputError(what, str(out), "free some room or choose another folder with -o") from error
        raise
    finally:
        release()


def check_file(path: Path, mark: bytes) -> None:
    """See, before long work, whether a file can be written; leaves nothing behind.

    Args:
        path: to be written.
        mark: what is in the first 4096 bytes of such files; only one of them may be replaced.

    Raises:
        OutputError: it is a folder or a file of another kind, or its folder cannot be written.
    """
    with _beside(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        if path.exists():
            with path.open("rb") as file:
                if mark not in file.read(4096):
                    raise OutputError("exists and is nothing that qcompile wrote", str(path), "choose another -o")


def write_file(path: Path, text: str) -> None:
    """Write one file whole or not at all; an earlier one is replaced.

    Raises:
        OutputError: it cannot be written there.
    """
    with _beside(path) as part:
        part.write_text(text, "utf-8")
        part.replace(path)


@contextmanager
def _beside(path: Path) -> Generator[Path]:
    """An empty file beside `path`, gone at the end; what the system refuses is an OutputError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        yield part
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise OutputError(f"cannot write there ({reason})", str(path), "choose another file with -o") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _refuse_foreign(out: Path) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    ours = _own_files(out)
    if not out.is_dir() or (ours is None and any(out.iterdir())):
        raise OutputError("exists and is not an artifact of qcompile", str(out), "remove it or choose another -o")
    foreign = _foreign(out, ours or set())
    if foreign is not None:
        what = f"holds '{foreign}', which qcompile did not write and would delete"
        raise OutputError(what, str(out), "move it or choose another -o")


def _behind_links(out: Path) -> Path:
    return out.resolve() if out.is_symlink() else out


def _own_files(out: Path) -> set[Path] | None:
    """The files that an artifact's manifest lists, and itself; None where there is no artifact."""
    try:
        manifest: Any = json.loads((out / MANIFEST).read_text("utf-8"))
        return {Path(MANIFEST), *map(Path, manifest["files"])} if manifest["kind"] == KIND else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _foreign(out: Path, ours: set[Path]) -> Path | None:
    """The first thing in a folder that is no file of the artifact and leads to none."""
    known = ours | {folder for file in ours for folder in file.parents}
    inside = (path.relative_to(out) for path in sorted(out.rglob("*")))
    return next((path for path in inside if path not in known and not _is_cache(path, ours)), None)


def _is_cache(path: Path, ours: set[Path]) -> bool:
    """Whether Python left it behind when it imported a file of the artifact."""
    if path.parent.name == _CACHE:
        return path.parent.parent / f"{path.name.split('.')[0]}.py" in ours
    return path.name == _CACHE and any(file.suffix == ".py" and file.parent == path.parent for file in ours)


def _temporary(out: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
    except OSError as error:
        if error.errno not in (*_FULL, *_FORBIDDEN):
            raise
        reason = os.strerror(error.errno or 0).lower()
        fix = "choose another folder with -o"
        raise OutputError(f"cannot write there ({reason})", str(out.absolute().parent), fix) from error


def _allow_as_usual(folder: Path) -> None:
    """The permissions of a folder that is made without a word about them."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes have left beside `out`: folders that nobody has locked."""
    for folder in out.absolute().parent.glob(f".{glob.escape(out.name)}.????????.part"):
        if folder.is_dir() and not folder.is_symlink():
            with locked(folder) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    """Put `folder` where `out` is; what was there goes only once the new folder is in place."""
    _refuse_foreign(out)
    if not out.exists():
        folder.rename(out)
        return
    old = _temporary(out)
    with locked(out):  # also under its new name
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
