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
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from qcompiler import registry
from qcompiler.errors import BadOption, Refusal
from qcompiler.model import Model
from qcompiler.options import build_pass, toml_value
from qcompiler.progress import Progress, Silent

EXACT: Literal["exact"] = "exact"
LOSSY: Literal["lossy"] = "lossy"
EFFORTS = ("low", "default", "high")
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
    """Base of all passes. Subclasses are frozen dataclasses with only JSON-able fields.

    Attributes:
        contract: whether the pass promises the same function.
        stage: "float": it works on the float graph; "lowering": it makes the QDQ graph of it; "lowered": it works on
            that.
        hints: options of the user that the pass only takes a hint from: another pass must keep to them.
        makes_codes: whether it makes the codes of all planned weights by itself.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = LOSSY
    stage: ClassVar[Literal["float", "lowering", "lowered"]] = "float"
    hints: ClassVar[tuple[str, ...]] = ()
    makes_codes: ClassVar[bool] = False

    def foresee(self, model: Model) -> None:  # noqa: B027 - most passes cannot know
        """Raise, before any pass has run on the model, what is certain to fail whatever the passes before do."""

    def requires(self, model: Model) -> None:  # noqa: B027 - most passes run on anything
        """Raise PassRefused if this pass cannot run on this model at all."""

    def adds_bytes(self, model: Model) -> int:  # noqa: ARG002 - most passes
        """Memory that it takes beside what every compilation does (see `build.memory.expected_peak`)."""
        return 0

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
    """A list of passes.

    Attributes:
        passes: in the order in which they run.
        verify: whether EXACT contracts are checked after each pass.
        where: the file or recipe that they are from, for messages; empty: none.
    """

    passes: Sequence[Pass]
    verify: bool = True
    where: str = field(default="", compare=False)

    def run(self, model: Model, progress: Progress | None = None) -> list[PassReport]:
        """Run every pass on `model` in place; return one report a pass."""
        from qcompiler.contracts import checked

        progress = progress or Silent()
        reports: list[PassReport] = []
        for item in self.passes:
            start = time.monotonic()
            run: Callable[[], PassReport] = lambda item=item: item.run(model, progress)  # noqa: E731
            with self.named(item):
                item.requires(model)
                report = checked(item, model, run) if self.verify and item.contract == EXACT else run()
            reports.append(_timed(report, time.monotonic() - start))
        return reports

    def foresee(self, model: Model) -> None:
        """Raise what is certain to fail on a model, before any pass has run."""
        for item in self.passes:
            with self.named(item):
                item.foresee(model)

    @contextmanager
    def named(self, item: Pass) -> Generator[None]:
        """Put the file and the pass into what is wrong with an option; those of the command line are not of a file."""
        try:
            yield
        except BadOption as error:
            if error.where.startswith("--"):
                raise
            own = f"'{item.registered_name()}'" in error.where or error.where == item.registered_name()
            parts = (self.where, error.where if own else f"pass '{item.registered_name()}' {error.where}".strip())
            raise BadOption(error.what, ", ".join(filter(None, parts)), error.fix) from error

    def to_toml(self) -> str:
        """The pipeline as TOML: one [[pass]] table a pass, options that differ from the default."""
        lines: list[str] = []
        for item in self.passes:
            lines += ["[[pass]]", f'name = "{item.registered_name()}"']
            for f in fields(item):
                value = getattr(item, f.name)
                if value != f.default:
                    lines.append(f"{f.name} = {toml_value(value)}")
            lines.append("")
        return "\n".join(lines)

    @staticmethod
    def from_toml(text: str, where: str = "pipeline", effort: str = "default", *, asked: bool = False) -> Pipeline:
        """The inverse of `to_toml`; names what is unknown or of the wrong type.

        Args:
            text: [[pass]] tables. One with a key `effort` (one of `EFFORTS`, or several) is there for these only.
            where: for messages.
            effort: which of them.
            asked: the user asked for an effort, so that it must make a difference.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BadOption(f"not valid TOML ({error})", where=where) from error
        if set(data) - {"pass"} or not isinstance(data.get("pass"), list):
            raise BadOption("a pipeline is a list of [[pass]] tables", where=where, fix="see passes/recipes")
        tables = [dict(table) for table in data["pass"]]
        if asked and not any("effort" in table for table in tables):
            what = "no pass of this pipeline depends on the effort"
            raise BadOption(what, "--effort", f'drop it, or give a pass of {where} an entry such as effort = "high"')
        chosen = [table for table in tables if effort in _efforts(table, where)]
        if tables and not chosen:
            raise BadOption(f"no pass is there for effort '{effort}'", where, "run it with another --effort")
        return Pipeline([build_pass(table, where) for table in chosen], where=where)

    @staticmethod
    def load(path: Path, effort: str = "default", *, asked: bool = False) -> Pipeline:
        """Read a TOML file; see `from_toml`."""
        try:
            return Pipeline.from_toml(path.read_text("utf-8"), str(path), effort, asked=asked)
        except (OSError, UnicodeDecodeError) as error:
            raise BadOption(f"cannot be read ({error})", where=str(path)) from error


def parse_pass(text: str, where: str, shared: Mapping[str, Any] | None = None) -> Pass:
    """A pass as an option of another one says it: a registered name, options behind a colon ("gptq: samples = 24").

    Args:
        text: as said.
        where: for messages.
        shared: options that it gets where it has such and the text does not say otherwise.

    Raises:
        BadOption: no such pass, no such option, or not written like this.
    """
    name, _, options = text.partition(":")
    try:
        table = tomllib.loads(f"options = {{{options}}}")["options"]
    except tomllib.TOMLDecodeError as error:
        raise BadOption(f"'{text}' is no pass ({error})", where, 'write it as in "gptq: samples = 24"') from error
    if "name" in table:
        raise BadOption(f"'{text}' is no pass", where, 'write it as in "gptq: samples = 24"')
    found = registry.names("passes").get(name.strip()) and registry.find("passes", name.strip())
    has = {f.name for f in fields(found)} if found else set[str]()
    given = {key: value for key, value in (shared or {}).items() if key in has}
    return build_pass({"name": name.strip(), **given, **table}, where)


def check_numbers(item: Pass, positive: Sequence[str], rates: Sequence[str] = ()) -> None:
    """Raise BadOption for options of a pass that are no such numbers.

    Args:
        item: the pass.
        positive: names of options that are 1 or more.
        rates: names of options that are 0 or more, and finite.
    """
    for name in (*positive, *rates):
        value = getattr(item, name)
        if not (value >= 1 if name in positive else 0 <= value < float("inf")):
            fix = "give 1 or more" if name in positive else "give 0 or more"
            raise BadOption(f"option '{name}' is {value}", f"pass '{item.registered_name()}'", fix)


def _timed(report: PassReport, seconds: float) -> PassReport:
    return PassReport(report.name, report.changed, report.refused, report.metrics, seconds)


def _efforts(table: dict[str, Any], where: str) -> tuple[str, ...]:
    """The efforts for which a pass is there; takes the entry out of its table."""
    given = table.pop("effort", EFFORTS)
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else ()  # type: ignore[reportUnknownArgumentType]
    if not found or not all(one in EFFORTS for one in found):  # type: ignore[reportUnknownVariableType]
        what = f"effort of pass '{table.get('name')}' is {given!r}"
        raise BadOption(what, where, f"write one of {', '.join(EFFORTS)}, or a list of them")
    return found  # type: ignore[reportUnknownVariableType]
