"""Private temporary folders that go away with their owner; those of killed processes go away with the next one.

A folder is locked for as long as it is in use, and the system frees the lock when a process dies, however it dies.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "qcompiler-locked-"  # only what is made here, so that an unlocked one is certainly abandoned


def claim(kind: str) -> tuple[Path, Callable[[], None]]:
    """A new folder that only this user can read, and what removes it.

    Args:
        kind: what it is for; part of its name.
    """
    _remove_abandoned()
    return hold(lambda: Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-")))


def hold(make: Callable[[], Path]) -> tuple[Path, Callable[[], None]]:
    """A new folder with its lock, and what removes it (where it still is) and lets go of the lock.

    Args:
        make: makes an empty folder; again where another process took it for an abandoned one before it was locked.
    """
    while True:
        folder = make()
        descriptor = _lock(folder, wait=True)
        if folder.is_dir() if descriptor is None else _is_still(folder, descriptor):
            break
        if descriptor is not None:
            os.close(descriptor)

    def release() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    return folder, release


@contextmanager
def temporary_folder(kind: str) -> Generator[Path]:
    """A folder as of `claim`, removed at the end of the block."""
    folder, release = claim(kind)
    try:
        yield folder
    finally:
        release()


@contextmanager
def locked(folder: Path) -> Generator[bool]:
    """Hold a folder's lock; False where that cannot be had."""
    descriptor = _lock(folder, wait=False)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if folder.is_dir() and not folder.is_symlink():
            with locked(folder) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """An open descriptor that holds the lock."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has no such locks
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether a folder is the one that was opened."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
