"""Progress with time left, on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


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
        yield from items

    def note(self, text: str) -> None:
        """Nothing."""


class Terminal:
    """Bars on stderr by rich; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """A bar with the time left, removed when done."""
        with self._bar() as bar:
            yield from bar.track(items, description=label, total=len(items))

    def note(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _bar(self) -> Iterator[object]:  # type: ignore[override]
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        with Bar(*columns, console=self._console, transient=True) as bar:
            yield bar
