"""Passes, their contracts, and the Pipeline that runs and checks them.

A pass is a frozen dataclass; its fields are its options, so parsing, equality, hashing and TOML come for
free. It edits the `Model` that the Pipeline owns and returns a `PassReport`. An `EXACT` pass promises the
same function (1e-5 relative in float32); the Pipeline holds it to that in verify mode, on calibration inputs
and on inputs with injected outliers.
"""

from __future__ import annotations

import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from qcompiler import registry
from qcompiler.errors import BadOption, Refusal
from qcompiler.model import Model
from qcompiler.progress import Progress, Silent

EXACT: Literal["exact"] = "exact"
LOSSY: Literal["lossy"] = "lossy"
__all__ = ["EXACT", "LOSSY", "Pass", "PassReport", "Pipeline", "Refusal"]


@dataclass(frozen=True)
class PassReport:
    """What a pass did.

    Attributes:
        name: of the pass.
        changed: how many sites or nodes it changed.
        refused: what it left alone, with reasons.
        metrics: numbers and small JSON-able tables for the report.
        seconds: filled in by the Pipeline.
    """

    name: str
    changed: int = 0
    refused: tuple[Refusal, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seconds: float = 0.0


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes. Subclasses are frozen dataclasses with only JSON-able fields."""

    contract: ClassVar[Literal["exact", "lossy"]] = LOSSY

    def requires(self, model: Model) -> None:  # noqa: B027 - most passes run on anything
        """Raise PassRefused if this pass cannot run on this model at all."""

    @abstractmethod
    def run(self, model: Model, progress: Progress) -> PassReport:
        """Edit `model` in place and say what was done."""

    @classmethod
    def registered_name(cls) -> str:
        """The name under which the class is registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        return next((n for n, t in registry.names("passes").items() if t == target), cls.__qualname__)


@dataclass(frozen=True)
class Pipeline:
    """A list of passes. `verify` checks EXACT contracts after each pass."""

    passes: Sequence[Pass]
    verify: bool = True

    def run(self, model: Model, progress: Progress | None = None) -> list[PassReport]:
        """Run every pass on `model` in place; return one report a pass."""
        from qcompiler.contracts import checked

        progress = progress or Silent()
        reports: list[PassReport] = []
        for item in self.passes:
            item.requires(model)
            start = time.monotonic()
            run: Callable[[], PassReport] = lambda item=item: item.run(model, progress)  # noqa: E731
            report = checked(item, model, run) if self.verify and item.contract == EXACT else run()
            reports.append(_timed(report, time.monotonic() - start))
        return reports

    def to_toml(self) -> str:
        """The pipeline as TOML: one [[pass]] table a pass, options that differ from the default."""
        lines: list[str] = []
        for item in self.passes:
            lines += ["[[pass]]", f'name = "{item.registered_name()}"']
            for f in fields(item):
                value = getattr(item, f.name)
                if value != f.default:
                    lines.append(f"{f.name} = {_toml_value(value)}")
            lines.append("")
        return "\n".join(lines)

    @staticmethod
    def from_toml(text: str, where: str = "pipeline") -> Pipeline:
        """The inverse of `to_toml`; names what is unknown or of the wrong type."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BadOption(f"not valid TOML ({error})", where=where) from error
        if set(data) - {"pass"} or not isinstance(data.get("pass"), list):
            raise BadOption("a pipeline is a list of [[pass]] tables", where=where, fix="see passes/recipes")
        return Pipeline([_build(dict(table), where) for table in data["pass"]])

    @staticmethod
    def load(path: Path) -> Pipeline:
        """Read a TOML file."""
        try:
            return Pipeline.from_toml(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise BadOption(f"cannot be read ({error})", where=str(path)) from error


def _timed(report: PassReport, seconds: float) -> PassReport:
    return PassReport(report.name, report.changed, report.refused, report.metrics, seconds)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"  # type: ignore[reportUnknownArgumentType]
    return repr(value)


def _build(table: dict[str, Any], where: str) -> Pass:
    name = table.pop("name", None)
    if not isinstance(name, str):
        raise BadOption("a [[pass]] table has no name", where=where)
    cls: type[Pass] = registry.find("passes", name)
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise BadOption(f"pass '{name}' has no option '{unknown[0]}'", where, f"it has {', '.join(known) or 'none'}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}  # type: ignore[reportUnknownArgumentType]
    for key, value in options.items():
        if isinstance(known[key].default, tuple) and not isinstance(value, tuple):
            options[key] = value = (value,)  # one value is a list of one
        _check_type(name, key, value, known[key].default, where)
    return cls(**options)


def _check_type(name: str, key: str, value: Any, default: Any, where: str) -> None:
    kinds: Iterable[type] = (type(default), int) if isinstance(default, float) else (type(default),)
    if default is not None and type(value) not in kinds:
        raise BadOption(
            f"option '{key}' of pass '{name}' is {value!r}",
            where,
            f"give a {type(default).__name__}, such as {default!r}",
        )
