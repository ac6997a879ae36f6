"""How commands print: tables for people on stdout, or one JSON object as the last line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(values: Mapping[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps(values, allow_nan=False), flush=True)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table whose first `left` columns are text and the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console(Console).print(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned "name  value" lines."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    _console(Console).print(table)


def _console(kind: Any) -> Any:
    """A console that is wide where stdout is no terminal, so that nothing is cut in a log."""
    console = kind(markup=False, highlight=False)
    return console if console.is_terminal else kind(markup=False, highlight=False, width=160)


def size(count: float) -> str:
    """Bytes for people."""
    from qcompiler.report.plots import size as text

    return text(count)


def of_outputs(kinds: Mapping[str, str], name: str | None = None) -> str:
    """Which output a figure is of, where a model has several: the named one, or the mean of those that differ."""
    if len(kinds) < 2:
        return ""
    return ", mean of the outputs that differ" if name is None else f" (output '{name}')"


def brief(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)
