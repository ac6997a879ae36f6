"""Where the losses of options come from: the methods by name, and their results as tables for a solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import PassRefused
from qcompiler.graph.sites import Site
from qcompiler.measure.curvature import fisher, fisher_sensitivity, hessian_traces, trace_sensitivity
from qcompiler.measure.masked import masked_sensitivity
from qcompiler.measure.pairwise import PairwiseSensitivity, pairwise_sensitivities
from qcompiler.measure.proxy import proxy_sensitivity
from qcompiler.measure.sensitivity import Sensitivity, sensitivities
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Menu
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress
from qcompiler.solvers.pairs import MOST_OPTIONS

Floats = npt.NDArray[np.float64]
Plans = Sequence[Sequence[SitePlan]]
UNITS = {  # of methods whose numbers are no losses of the model's output
    "hutchinson": "mean curvature times squared error of the weights",
    "hessian": "errors of single layers",
    "masked": "shares of the largest",
    "masked-output": "shares of the largest",
}
_PAIRED = ("gram", "pairwise")  # the methods that know how changes of two sites add up


@dataclass(frozen=True, eq=False)
class Losses:
    """What a solver is given.

    Attributes:
        rows: by menu the losses of its options; inf where an option must not be taken.
        noise: by menu their standard errors.
        cross: float64 [menus * options, menus * options], quadratic terms between menus as `solvers.Problem` wants
            them (rows padded to the longest menu), or None.
        facts: for the report.
    """

    rows: list[list[float]]
    noise: list[list[float]]
    cross: Floats | None
    facts: Mapping[str, Any]


def measured_losses(
    model: Model, menus: Sequence[Menu], method: str, samples: int, seconds: float, progress: Progress
) -> Losses:
    """Measure the options of all menus.

    Args:
        model: float, with calibration data.
        menus: with at least one option each.
        method: one of `METHODS`.
        samples: of the calibration data; 0: as many as are enough.
        seconds: of all cores that measuring may take, where the method can adapt.
        progress: shows how far and how long.

    Raises:
        PassRefused: no option of a site has a finite loss.
    """
    if not menus:
        return Losses([], [], None, {})
    sites, plans = [m.site for m in menus], [list(m.plans) for m in menus]
    found = METHODS[method](model, sites, plans, samples, seconds, progress)
    rows = [[v if math.isfinite(v) else math.inf for v in map(float, row)] for row in found.loss]
    if all(min(row) == math.inf for row in rows):
        what = "the output is infinite or NaN on the calibration data, whatever the formats"
        where = f"{model.name}, largest weights in {_largest(menus)}"
        raise PassRefused(what, where, "repair the weights or the data")
    for m, row in zip(menus, rows, strict=True):
        if min(row) == math.inf:
            raise PassRefused("every option makes the output infinite or NaN", m.site.name, "keep it float: --keep")
    size = len(rows) * max(map(len, rows))
    cross = _padded_cross(found) if method in _PAIRED and len(rows) > 1 and size <= MOST_OPTIONS else None
    facts: dict[str, Any] = {name: getattr(found, name) for name in ("mode", "samples", "probes", "seconds")}
    facts |= {"method": method, "cross terms": cross is not None}
    return Losses(rows, [[float(v) for v in row] for row in found.noise], cross, facts)


def _padded_cross(found: Sensitivity) -> Floats | None:
    """The terms between sites, at the positions of a table whose rows are all as long as the longest."""
    starts, gram = found.cross() if isinstance(found, PairwiseSensitivity) else found.reliable_cross()
    np.fill_diagonal(gram, 0)
    gram[~np.isfinite(gram)] = 0  # of options that will not be taken
    width = int(np.diff(starts).max())
    places = np.concatenate([unit * width + np.arange(count) for unit, count in enumerate(np.diff(starts))])
    cross = np.zeros((len(found.loss) * width,) * 2)
    cross[np.ix_(places, places)] = gram
    return cross if cross.any() else None


def _largest(menus: Sequence[Menu]) -> str:
    """The site with the largest weight: the first suspect where numbers overflow."""
    return max(menus, key=lambda m: float(np.abs(m.site.matrix()).max())).site.name


def _ablation(
    model: Model, sites: Sequence[Site], plans: Plans, samples: int, seconds: float, progress: Progress
) -> Sensitivity:
    return sensitivities(model, sites, plans, samples=samples, seconds=seconds, progress=progress)


def _pairwise(
    model: Model, sites: Sequence[Site], plans: Plans, samples: int, _seconds: float, progress: Progress
) -> Sensitivity:
    return pairwise_sensitivities(model, sites, plans, samples=samples or None, progress=progress)


def _fisher(
    model: Model, sites: Sequence[Site], plans: Plans, samples: int, _seconds: float, progress: Progress
) -> Sensitivity:
    return fisher_sensitivity(sites, plans, fisher(model, sites, samples=samples or 64, progress=progress))


def _hutchinson(
    model: Model, sites: Sequence[Site], plans: Plans, samples: int, _seconds: float, progress: Progress
) -> Sensitivity:
    return trace_sensitivity(sites, plans, hessian_traces(model, sites, samples=samples or 64, progress=progress))


def _hessian(
    model: Model, sites: Sequence[Site], plans: Plans, samples: int, _seconds: float, _progress: Progress
) -> Sensitivity:
    return proxy_sensitivity(model, sites, plans, limit=samples or None)


def _masked(
    model: Model, sites: Sequence[Site], plans: Plans, samples: int, _seconds: float, progress: Progress, disturb: Any
) -> Sensitivity:
    return masked_sensitivity(model, sites, plans, disturb=disturb, samples=samples or 8, progress=progress)


METHODS: dict[str, Callable[[Model, Sequence[Site], Plans, int, float, Progress], Sensitivity]] = {
    "gram": _ablation,  # one site at a time, and how the changes of the output line up
    "ablation": _ablation,  # the same without the terms between sites
    "pairwise": _pairwise,  # CLADO: every pair by a run
    "fisher": _fisher,
    "hutchinson": _hutchinson,  # HAWQ's traces
    "hessian": _hessian,  # BAQ's proxy: no loss of the model, only of each layer
    "masked": partial(_masked, disturb="weight"),  # OHQ
    "masked-output": partial(_masked, disturb="output"),
}
