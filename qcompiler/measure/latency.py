"""Seconds of every option of every site, by running the target's own kernels on this machine.

Operations are told apart by what decides their time (shapes and formats, not weights), so a model has far fewer
of them than options, and each is measured once a machine: times are cached by the work, the sources of the
kernels, the compiler and the processor (OHQ; HAWQ-V3 keeps such tables by hand).

A time is the least, over several windows, of the medians of interleaved runs: whatever else the machine does hits
all works of a window alike, and only ever adds. Runs that the system interrupted for another process don't count
where others are left, else they count with the processor time that they used if that is less. The part of a
model that no option changes is what one whole compiled model takes beyond the sum of its parts.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from qcompiler.graph.sites import Site
from qcompiler.measure.cache import Cache
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress
from qcompiler.target import Backend

Shapes = Mapping[str, tuple[int, ...]]
Run = Callable[[], object]
K = TypeVar("K")
_TOGETHER = 32  # works that are built, take turns and are kept together: what a kill loses


@dataclass(frozen=True)
class Part:
    """Work that an operation needs, and the share of it that the operation bears (less than 1 where it is common).

    Attributes:
        work: hashable; its `repr` says all that its time depends on, beside the machine.
        share: in (0, 1].
    """

    work: Hashable
    share: float = 1.0


class Clock(Protocol):
    """What a backend offers whose kernels can be timed alone (its method `clock`)."""

    @property
    def machine(self) -> str:
        """All that a time depends on beside the work: sources of the kernels, compiler, processor, threads."""
        ...

    def parts(self, site: Site, plan: SitePlan, shapes: Shapes) -> Sequence[Part]:
        """What a site runs under a plan; nothing for what stays float.

        Args:
            site: whose.
            plan: one that the backend supports.
            shapes: of the inputs and outputs of the site's operations, by the names of the values.
        """
        ...

    def build(self, works: Sequence[Any]) -> Callable[[Any], Run]:
        """Compile the kernels of some works at once; the result makes the data of one of them and gives its run."""
        ...


def clock_of(backend: Backend) -> Clock | None:
    """What times the backend's kernels on this machine; None for one that cannot.

    Raises what `backend.clock` raises: MissingExtra or BackendUnavailable.
    """
    make: Callable[[], Clock] | None = getattr(backend, "clock", None)
    return None if make is None else make()


@dataclass(frozen=True)
class Effort:
    """How long to measure: `windows` times `rounds` runs of each after `warm` runs, but not beyond `seconds`.

    The first window is always completed.
    """

    windows: int = 5
    rounds: int = 9
    warm: int = 2
    seconds: float = 20.0


def preemptions() -> int:
    """How often the system has taken the processor from a thread of this process to give it to another."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass
class Times:
    """Seconds of works, measured when first asked for.

    Attributes:
        clock: the backend's.
        cache: where times outlive the process; None: nowhere.
        effort: for each few works that are measured together.
        now, interruptions: the time in seconds, and how often other processes got the processor.
    """

    clock: Clock
    cache: Cache | None = None
    effort: Effort = field(default_factory=Effort)
    now: Callable[[], float] = time.perf_counter
    interruptions: Callable[[], int] = preemptions
    _known: dict[Hashable, float] = field(default_factory=dict[Hashable, float])

    def __post_init__(self) -> None:
        self._machine = self.clock.machine

    def measure(self, works: Sequence[Hashable], progress: Progress) -> dict[Hashable, float]:
        """Seconds of each work; what neither this object nor the cache knows is built and run."""
        wanted = list(dict.fromkeys(works))
        for work in wanted:
            found = None if self.cache is None or work in self._known else self.cache.get(self._key(work))
            if found is not None:
                self._known[work] = float(found["seconds"])
        missing = [work for work in wanted if work not in self._known]
        if missing:
            self._run(missing, progress)
        return {work: self._known[work] for work in wanted}

    def table(
        self, sites: Sequence[Site], plans: Sequence[Sequence[SitePlan]], shapes: Shapes, progress: Progress
    ) -> list[list[float]]:
        """Seconds per site and option: the sum of its parts."""
        parts = [[self.clock.parts(s, p, shapes) for p in row] for s, row in zip(sites, plans, strict=True)]
        seconds = self.measure([part.work for row in parts for option in row for part in option], progress)
        return [[sum(part.share * seconds[part.work] for part in option) for option in row] for row in parts]

    def _run(self, works: Sequence[Hashable], progress: Progress) -> None:
        groups = [works[i : i + _TOGETHER] for i in range(0, len(works), _TOGETHER)]
        for group in progress.track(groups, "Building and timing kernels"):
            prepare = self.clock.build(group)
            runs = {work: prepare(work) for work in group}
            found = interleaved(runs, self.effort, self.now, self.interruptions)
            for work, seconds in found.items():
                self._known[work] = seconds
                if self.cache is not None:
                    self.cache.put(self._key(work), {"seconds": np.array(seconds)})

    def _key(self, work: Hashable) -> str:
        return Cache.key("seconds", 1, self._machine, repr(work), repr(self.effort))


def interleaved(
    runs: Mapping[K, Run],
    effort: Effort,
    now: Callable[[], float] = time.perf_counter,
    interruptions: Callable[[], int] = preemptions,
) -> dict[K, float]:
    """Seconds of each run: the least of the windows' medians, all taking turns, each round in the opposite order."""
    for _ in range(effort.warm):
        for run in runs.values():
            run()
    best = dict.fromkeys(runs, math.inf)
    start = now()
    for window in range(effort.windows):
        if window and now() - start > effort.seconds:
            break
        for key, seconds in _window(runs, effort.rounds, now, interruptions).items():
            best[key] = min(best[key], seconds)
    return best


def _window(
    runs: Mapping[K, Run], rounds: int, now: Callable[[], float], interruptions: Callable[[], int]
) -> dict[K, float]:
    """The median of each run over the rounds that nothing interrupted; over all where each was interrupted."""
    clean: dict[K, list[float]] = {key: [] for key in runs}
    disturbed: dict[K, list[float]] = {key: [] for key in runs}
    for number in range(rounds):
        for key in list(runs) if number % 2 else reversed(list(runs)):
            before, worked, begin = interruptions(), time.process_time(), now()
            runs[key]()
            seconds, worked = now() - begin, time.process_time() - worked
            if interruptions() == before:
                clean[key].append(seconds)
            else:  # the work of all threads is at least what the run takes alone, as is the time that it took
                disturbed[key].append(min(seconds, worked))
    return {key: statistics.median(clean[key] or disturbed[key]) for key in runs}
