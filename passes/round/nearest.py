"""Round to nearest, with clipped scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import NotFinite, PassRefused
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import Method, quantize
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.curvature import fisher
from qcompiler.measure.gram import gram_parts, grams, multiplied
from qcompiler.measure.samples import samples_for_one
from qcompiler.measure.segments import Segments
from qcompiler.measure.stream import calibration_of
from qcompiler.model import Model
from qcompiler.passes.round.rows import input_rows
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.pipeline import Pass, PassReport, check_numbers
from qcompiler.progress import Progress

_ROWS = 256  # of each sample: enough for a mean


@dataclass(frozen=True)
class Nearest(Pass):
    """Every planned weight becomes its nearest code.

    Attributes:
        clipping: "mse" searches the scales of least squared error, "minmax" covers every weight, "hqq" (half-quadratic
            quantization) lets few weights be far off where that brings the many closer.
        importance: "activations" weighs the errors of a column by the mean square of its input, "moments" takes the
            squared error of the output within each group of columns (as AWQ clips), "fisher" weighs those of every
            weight by the diagonal of the Fisher information (FGMP; needs the extra `torch`). Where a format has groups
            of two widths, it also says which are promoted.
        samples: of the calibration data, for the importance.
    """

    makes_codes: ClassVar[bool] = True
    clipping: Method = "mse"
    importance: Literal["none", "activations", "moments", "fisher"] = "none"
    samples: int = 32

    def __post_init__(self) -> None:
        check_numbers(self, ("samples",))

    def requires(self, model: Model) -> None:
        """Refuse a lowered model, and importance without data."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if self.importance != "none" and model.calibration is None:
            raise PassRefused(f"importance by {self.importance} needs calibration data", where=model.name)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights`."""
        sites = [site for site in find_sites(model.ir) if site.name in model.plan.sites]
        specs = {site: spec for site in sites if (spec := model.plan.sites[site.name].weight) is not None}
        weights = self._importance(model, sites, progress)
        for part in gram_parts(specs, lambda site: [site]) if self.importance == "moments" else [list(specs)]:
            if self.importance == "moments":
                weights = _moments(model, part, self.samples)
            for site in progress.track(part, "Rounding"):
                try:
                    model.weights[site.name] = quantize(site.matrix(), specs[site], self.clipping, weights(site))
                except NotFinite as error:
                    raise NotFinite(error.what, site.name, error.fix) from error
        return PassReport(self.registered_name(), len(specs))

    def _importance(self, model: Model, sites: list[Site], progress: Progress) -> Callable[[Site], Floats | None]:
        """For a site the weights of its squared errors, if there are any."""
        if self.importance == "fisher":
            found = fisher(model, sites, samples=self.samples, progress=progress)
            return lambda site: found.of(site) / (found.means[site.name].max() or np.float32(1))
        powers = _powers(model, sites, self.samples) if self.importance == "activations" else {}
        return lambda site: powers.get(site.name)


def _moments(model: Model, sites: list[Site], samples: int) -> Callable[[Site], Floats | None]:
    """Second moments of each site's input relative to the largest mean square, [products, columns, columns]."""
    known = grams(model, sites, samples * samples_for_one(model.ir, calibration_of(model)))

    def of(site: Site) -> Floats | None:
        if site.name not in known:
            return None
        matrix = known[site.name].matrix
        return matrix / (np.einsum("gkk->gk", matrix).max() or np.float32(1))

    return of


def _powers(model: Model, sites: list[Site], samples: int) -> dict[str, Floats]:
    """Mean square of what each site multiplies relative to its largest column, [rows, columns] as the weight."""
    segments = Segments(model.ir)
    sites_of = {user: site for site in sites for user in multiplied(site).values()}
    rng = np.random.default_rng(0)
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for feed in calibration_feeds(model, samples, 1 << 13):
        left = dict.fromkeys(sites_of)
        for segment, boundary in segments.boundaries(feed):
            here = {user: str(value.name) for user in left if (value := user.inputs[0]) is not None}
            here = {user: name for user, name in here.items() if name in segment.made or name in boundary}
            read = segment.read(boundary, list(here.values()))
            for user, name in here.items():
                site = sites_of[user]
                rows = input_rows(site, read[name], _ROWS, rng, user)
                sums[site.name] = sums.get(site.name, 0) + np.square(rows, dtype=np.float64).sum(0)
            left = {user: None for user in left if user not in here}
    sizes = {site.name: site.rows for site in sites}
    relative = {name: (power / (power.max() or 1.0)).astype(np.float32) for name, power in sums.items()}
    return {name: np.repeat(power, sizes[name] // len(power), 0) for name, power in relative.items()}
