"""Write an output folder all or nothing: into a temporary sibling, renamed when complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompiler.artifact.manifest import KIND, MANIFEST
from qcompiler.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)


def check_output(out: Path) -> None:
    """See, before long work, whether `out` can be written; leaves nothing behind.

    Raises:
        OutputError: it exists and is not an artifact, or its parent cannot be written.
    """
    _refuse_foreign(out)
    _temporary(_behind_links(out)).rmdir()


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends, and vanishes if it fails.

    An earlier artifact at `out` is replaced only then; a link to one stays, and what it points to is replaced.

    Raises:
        OutputError: as in `check_output`, or the disk is full.
    """
    _refuse_foreign(out)
    out = _behind_links(out)
    folder = _temporary(out)
    try:
        yield folder
        _publish(folder, out)
    except OSError as error:
        if error.errno in _FULL:
            what = f"no room left ({os.strerror(error.errno or 0).lower()})"
            raise OutputError(what, str(out), "free some room or choose another folder with -o") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign(out: Path) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_dir() and (not any(out.iterdir()) or _is_ours(out)):
        return
    raise OutputError("exists and is not an artifact of qcompile", str(out), "remove it or choose another -o")


def _behind_links(out: Path) -> Path:
    return out.resolve() if out.is_symlink() else out


def _is_ours(out: Path) -> bool:
    try:
        manifest: Any = json.loads((out / MANIFEST).read_text("utf-8"))
        return bool(manifest["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _temporary(out: Path) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
    except OSError as error:
        if error.errno not in (*_FULL, *_FORBIDDEN):
            raise
        reason = os.strerror(error.errno or 0).lower()
        fix = "choose another folder with -o"
        raise OutputError(f"cannot write there ({reason})", str(out.absolute().parent), fix) from error
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    return folder


def _publish(folder: Path, out: Path) -> None:
    """Put `folder` where `out` is; what was there goes only once the new folder is in place."""
    _refuse_foreign(out)
    if not out.exists():
        folder.rename(out)
        return
    old = _temporary(out)
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
