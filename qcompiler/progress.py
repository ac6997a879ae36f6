"""Progress with time left, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
_PLAIN_INTERVAL = 10.0  # seconds between lines where stderr is a file or a pipe


class Progress(Protocol):
    """What long work reports to."""

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """Iterate over items, showing how far and how long."""
        ...

    def note(self, text: str) -> None:
        """One line that the user should see."""
        ...


class Silent:
    """Shows nothing."""

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """Plain iteration."""
        del label
        yield from items

    def note(self, text: str) -> None:
        """Nothing."""


class Terminal:
    """Bars on stderr by rich where stderr is a terminal, a line now and then where it is not."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._nested = False

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """A bar with the time left, removed when done. Loops within a loop show the outer bar only."""
        if self._nested:
            yield from items
            return
        self._nested = True
        try:
            yield from self._bars(items, label) if self._console.is_terminal else _lines(items, label)
        finally:
            self._nested = False

    def note(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _bars(self, items: Sequence[T], label: str) -> Iterator[T]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        left = TimeRemainingColumn(elapsed_when_finished=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left, TextColumn("left"))
        with Bar(*columns, console=self._console, transient=True) as bar:
            yield from bar.track(items, description=label, total=len(items))


def _lines(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate, printing "label: 3 of 40, 75 s left" at most every few seconds.

    The time left is by the pace since the last line: what an earlier run has left in the cache takes no time.
    """
    last, told = time.monotonic(), 0
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - last >= _PLAIN_INTERVAL:
            left = (now - last) / (number - told) * (len(items) - number)
            print(f"{label}: {number} of {len(items)}, {left:.0f} s left", file=sys.stderr, flush=True)
            last, told = now, number
        yield item
