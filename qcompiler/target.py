"""What a target must offer. The backends themselves live in `qcompiler.backends` and are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress

Feeds = Mapping[str, npt.NDArray[Any]]
Outputs = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Tolerance:
    """How far an artifact may be from its QDQ reference: ||y - ref|| <= allowed * ||ref|| for every output.

    Attributes:
        relative: allowed where no activation is rounded at run time, and the least that is allowed elsewhere.
        reason: why it is not zero ("dynamic int8 activations in MatMulNBits", "fp32 summation order").
        noise: by how much the target's arithmetic may move a number that is about to be rounded, relative to the
            reach of that rounding. What it does to the outputs is measured on the reference (artifact/spread.py),
            and a few times that is allowed.
    """

    relative: float
    reason: str
    noise: float = 0.0


@dataclass(frozen=True)
class Compiled:
    """What a backend wrote.

    Attributes:
        files: names relative to the folder.
        tolerance: against the QDQ reference.
        facts: JSON-able facts for manifest and report (which nodes fused, kernels, ...).
    """

    files: Sequence[str]
    tolerance: Tolerance
    facts: Mapping[str, Any]


class Runnable(Protocol):
    """A loaded artifact."""

    def run(self, feeds: Feeds) -> Outputs:
        """All outputs of the model, by name, for one batch of inputs by name."""
        ...


class Backend(Protocol):
    """A target: frozen data and four verbs.

    It may have a method `require` that raises `MissingExtra` or `BackendUnavailable` where this machine lacks what
    `compile` needs, and a method `check` that takes a captured `Model` and raises `BadModel` where it holds an
    operator that `compile` will refuse, so that long work does not start in vain. It may have a field `activations`
    ("float", "static" or "dynamic": what its candidates should ask for) and a field `ties` ("none", "inputs" or
    "adds": which sites must share one plan, see `graph.topology.tie_groups`), and an attribute `program_bytes`: the
    resident bytes beyond the compiler's own, on a model of a few kB, of its toolchain in this process and of the fresh
    process that runs its files to verify them, together. It may have a method `clock` that returns what times its
    kernels one by one on this machine (`measure.latency.Clock`): then it takes budgets in seconds.
    """

    @property
    def name(self) -> str:
        """The name under which it is registered."""
        ...

    def candidates(self, site: Site, bits: Sequence[int]) -> list[SitePlan]:
        """The plans worth offering the allocator for a site, best kernels first, one or more a width."""
        ...

    def supports(self, site: Site, plan: SitePlan) -> str | None:
        """None, or the reason why this target cannot run this plan."""
        ...

    def compile(self, model: Model, folder: Path, progress: Progress) -> Compiled:
        """Write the target's files for a lowered model into an existing folder."""
        ...

    def load(self, folder: Path) -> Runnable:
        """Load what `compile` wrote."""
        ...


def require_toolchain(backend: Backend) -> None:
    """Raise what `backend.require` raises, if it has one."""
    check: Callable[[], None] | None = getattr(backend, "require", None)
    if check is not None:
        check()


def check_operators(backend: Backend, model: Model) -> None:
    """Raise what `backend.check` raises, if it has one."""
    check: Callable[[Model], None] | None = getattr(backend, "check", None)
    if check is not None:
        check(model)


def program_bytes(backend: Backend) -> int:
    """`backend.program_bytes`, or 0 where it does not say."""
    return int(getattr(backend, "program_bytes", 0))
