"""BiasCorrection: give every output channel back the mean that quantization took from it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, in its empirical
form: E[W x - W~ x~] for each output channel, site by site, with all earlier sites quantized and corrected. Where a
Relu or Clip follows, the mean in front of it may be off where nobody looks; so a shift is judged by the error
behind it, and a channel that it would not help is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.formats import QTensor
from qcompiler.formats.base import Floats
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.segments import Boundary, Segments
from qcompiler.model import Model
from qcompiler.passes.lower.bias import append_add, has_bias, shaped
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.quantized_values import bounds_of, follower
from qcompiler.passes.round.rows import block_count
from qcompiler.passes.round.streams import calibration_feeds, narrow_rows
from qcompiler.pipeline import Pass, PassReport, Refusal
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]
_POSITIONS = 512  # of each sample that a mean is taken over


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Fill `model.bias_shift` for the rounded sites; static ranges and narrow rows are simulated too.

    Attributes:
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        create: add a bias where an operation has none; that is 4 bytes a row, which no budget has room for.
    """

    samples: int = 32
    tokens: int = 4096
    create: bool = False

    def requires(self, model: Model) -> None:
        """Refuse a model that is lowered, planned but not rounded, or without data."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        planned = any(plan.weight is not None for plan in model.plan.sites.values())
        if not model.weights and not model.ranges and planned:
            raise PassRefused("nothing is quantized yet", where=model.name, fix="run it after a rounding pass")
        if model.calibration is None:
            raise PassRefused("bias correction needs calibration data", where=model.name)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Measure and store the shifts; metrics hold the largest one of each site, in standard deviations."""
        sites = [site for site in find_sites(model.ir) if site.name in model.weights]
        refused = [Refusal(s.name, "a table has no output channels to correct") for s in sites if s.op == "Gather"]
        sites = [site for site in sites if site.op != "Gather"]
        shared = {site.name for site in sites if len(site.users) > 1}
        refused += [
            Refusal(name, "several operations use it, whose means one shift cannot all mend") for name in shared
        ]
        sites = [site for site in sites if site.name not in shared]
        if not self.create:
            bare = {site.name for site in sites if not has_bias(site)}
            refused += [Refusal(name, "it has no bias, and a new one would be stored") for name in sorted(bare)]
            sites = [site for site in sites if site.name not in bare]
        if not sites:
            return PassReport(self.registered_name(), 0, tuple(refused))
        feeds = calibration_feeds(model, self.samples, self.tokens)
        shifts, sizes = self._shifts(model, sites, feeds, progress)
        model.bias_shift.update(shifts)
        return PassReport(self.registered_name(), len(shifts), tuple(refused), {"largest_shift": sizes})

    def _shifts(
        self, model: Model, sites: list[Site], feeds: list[dict[str, Array]], progress: Progress
    ) -> tuple[dict[str, Floats], dict[str, float]]:
        """Site by site: what the output lacks when all before is quantized and corrected."""
        simulated = _simulation(model, sites)
        exact, found = (
            _Stream(m, model.weights.keys(), codes, feeds) for m, codes in ((model, {}), (simulated, model.weights))
        )
        shifts: dict[str, Floats] = {}
        sizes: dict[str, float] = {}
        for site in progress.track(sites, "Correcting biases"):
            activation = follower(site.node.outputs[0])
            bounds = None if activation is None else bounds_of(activation)
            reference = exact.outputs(site.name)
            shift = _best_shift(reference, found.outputs(site.name), bounds or (-np.inf, np.inf))
            shifts[site.name] = shift
            sizes[site.name] = float(np.abs(shift).max() / max(reference.std(dtype=np.float64), 1e-12))
            constant = simulated.graph.initializers[_shift_name(site)].const_value
            assert constant is not None
            found.replaced[_shift_name(site)] = shift.reshape(constant.numpy().shape)
        return shifts, sizes


def _simulation(model: Model, sites: list[Site]) -> Model:
    """A copy with quantized activations, and behind each site the addition of a shift, zero so far."""
    copy = model.clone()
    own = {site.name: site for site in find_sites(copy.ir)}
    for site in (own[s.name] for s in sites):
        _append_shift(copy.graph, site)
    rows = {name: replace(entry, weight=None) for name, entry in narrow_rows(model.plan).items()}
    copy.plan, copy.weights, copy.bias_shift = Plan(rows), {}, {}
    InsertQDQ().run(copy, Silent())
    return copy


def _shift_name(site: Site) -> str:
    return f"{site.name}/bias_shift"


def _append_shift(graph: ir.Graph, site: Site) -> None:
    """Add a constant, zero so far, to the output of a site; the sum takes over the output's name."""
    name = _shift_name(site)
    dtype = (site.weight.dtype or ir.DataType.FLOAT).numpy()
    zeros = shaped(site, np.zeros(site.rows, np.float32)).astype(dtype)
    shift = ir.val(name, const_value=ir.tensor(zeros, name=name))
    graph.register_initializer(shift)
    for node in site.users:
        if node.op_type != "Gather":
            append_add(graph, node, shift)


class _Stream:
    """Calibration data in front of one segment of a model, moved on as needed; sites must come in order.

    Attributes:
        replaced: initializer name -> array, used instead from here on.
    """

    def __init__(
        self, model: Model, rounded: Collection[str], codes: Mapping[str, QTensor], feeds: list[dict[str, Array]]
    ) -> None:
        self.sites = {site.name: site for site in find_sites(model.ir) if site.name in rounded}
        self.replaced: dict[str, Array] = {}
        self._codes = codes
        self._segments = Segments(model.ir, list(self.sites.values()))
        self._boundaries: list[Boundary] = [self._segments.start(feed) for feed in feeds]
        self._position = -1
        self._seen: dict[str, Floats] = {}

    def outputs(self, name: str) -> Floats:
        """Output of a site, [positions of all samples, rows], thinned out."""
        index = self._segments.index_of(name)
        while self._position < index:
            self._step()
        if self._codes:  # what is before a site may have changed since
            return self._read([name])[name]
        if name not in self._seen:
            self._seen = self._read([s.name for s in self._segments[index].sites if s.op != "Gather"])
        return self._seen[name]

    def _step(self) -> None:
        """Go behind a segment; decode the weights of the next one, and let go of those that nothing needs now."""
        if self._position >= 0:
            segment = self._segments[self._position]
            self._boundaries = [segment.run(boundary, self.replaced) for boundary in self._boundaries]
            segment.drop()
        self._position += 1
        rest = list(self._segments)[self._position :]
        later = frozenset[str]().union(*(segment.weights for segment in rest))
        self.replaced = {name: array for name, array in self.replaced.items() if name in later}
        for site in rest[0].sites:
            if site.name in self._codes:
                self.replaced[str(site.weight.name)] = site.from_matrix(self._codes[site.name].decode())

    def _read(self, names: list[str]) -> dict[str, Floats]:
        values = {name: str(self.sites[name].node.outputs[0].name) for name in names}
        parts: dict[str, list[Floats]] = {name: [] for name in names}
        for boundary in self._boundaries:
            found = self._segments[self._position].read(boundary, list(values.values()), self.replaced)
            for name in names:
                parts[name].append(_by_channel(self.sites[name], found[values[name]]))
        return {name: np.concatenate(part) for name, part in parts.items()}


def _by_channel(site: Site, y: Array) -> Floats:
    """[positions, rows], evenly thinned out."""
    if site.layout.startswith("conv"):
        flat = np.moveaxis(y, 1, -1).reshape(-1, site.rows)
    elif block_count(site) == 1:
        flat = y.reshape(-1, site.rows)
    else:  # a batch of matrices: [..., *batch, positions, N] -> [positions, batch * N]
        batch = (*site.shape[:-2], site.shape[-1])
        flat = y.reshape(-1, block_count(site), *y.shape[-2:]).swapaxes(1, 2).reshape(-1, prod(batch))
    step = max(1, len(flat) // _POSITIONS)
    return np.asarray(flat[::step], np.float32)


def _best_shift(exact: Floats, found: Floats, bounds: tuple[float, float]) -> Floats:
    """Of no shift, the mean difference and the median difference: the best for each channel.

    Judged by the absolute error: a few clipped outliers would otherwise decide for all other positions.
    """
    goal = np.clip(exact, *bounds)
    choices = [np.zeros(exact.shape[1]), (exact - found).mean(0), np.median(exact - found, 0)]
    errors = [np.abs(np.clip(found + shift, *bounds) - goal).mean(0) for shift in choices]
    return np.choose(np.argmin(errors, 0), choices).astype(np.float32)
