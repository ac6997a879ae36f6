"""The clock of all deadlines, which an interrupt (Ctrl-C) moves past every one of them.

So a solve that is interrupted ends as one whose time is over: with the best choice and bound known by then.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class _Watch:
    """Of the main thread, the only one that is interrupted."""

    def __init__(self) -> None:
        self.watching, self.stopped, self.raising = False, False, False

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """End what is being solved; the second time, or within `interrupts_raise`, as usual."""
        again, self.stopped = self.stopped, True
        if again or self.raising:
            signal.default_int_handler(signum, frame)


_watch = _Watch()


def now() -> float:
    """`time.monotonic()`, or infinity once `interruptible` work has been interrupted."""
    return math.inf if interrupted() else time.monotonic()


def interrupted() -> bool:
    """Whether the `interruptible` work that goes on was interrupted."""
    return _watch.stopped and threading.current_thread() is threading.main_thread()


@contextmanager
def interruptible() -> Generator[None]:
    """Let the first interrupt stop the clock instead of raising KeyboardInterrupt; the second one raises it.

    Nothing changes outside the main thread, within another `interruptible` or `interrupts_raise`, and where the
    program has its own way with interrupts.
    """
    free = not (_watch.watching or _watch.raising) and threading.current_thread() is threading.main_thread()
    if not free or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _watch.watching, _watch.stopped = True, False
    signal.signal(signal.SIGINT, _watch.stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _watch.watching = _watch.stopped = False


@contextmanager
def interrupts_raise() -> Generator[None]:
    """An interrupt raises KeyboardInterrupt: where a solve is a part of more work, or another program solves."""
    before, _watch.raising = _watch.raising, True
    try:
        yield
    finally:
        _watch.raising = before
