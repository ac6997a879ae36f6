"""BiasCorrection: give every output channel back the mean that quantization took from it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, in its empirical
form: E[W x - W~ x~] for each output channel, site by site, with all earlier sites quantized and corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.segments import Boundary, Segment, Segments
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.pipeline import Pass, PassReport, Refusal
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Fill `model.bias_shift` for the rounded sites; the ranges of static activations are simulated too.

    Attributes:
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
    """

    samples: int = 32
    tokens: int = 8192

    def requires(self, model: Model) -> None:
        """Refuse a model that is lowered, not rounded, or without data."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if not model.weights and not model.ranges:
            raise PassRefused("nothing is quantized yet", where=model.name, fix="run it after a rounding pass")
        if model.calibration is None:
            raise PassRefused("bias correction needs calibration data", where=model.name)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Measure and store the shifts; metrics hold the largest one of each site, relative to the output."""
        sites = [site for site in find_sites(model.ir) if site.name in model.weights]
        refused = [Refusal(s.name, "a table has no output channels to correct") for s in sites if s.op == "Gather"]
        sites = [site for site in sites if site.op != "Gather"]
        feeds = calibration_feeds(model, self.samples, self.tokens)
        exact = _exact_means(model, sites, feeds)
        simulated = _simulation(model, sites)
        shifts = _shifts(simulated, model, exact, feeds, progress)
        model.bias_shift.update(shifts)
        sizes = {name: float(np.abs(s).max() / max(np.abs(exact[name]).max(), 1e-12)) for name, s in shifts.items()}
        return PassReport(self.registered_name(), len(shifts), tuple(refused), {"largest_shift": sizes})


def _mean(site: Site, outputs: list[Array]) -> npt.NDArray[np.float32]:
    """Mean over everything but the output channels: float32 [rows]."""
    axis = 1 if site.layout.startswith("conv") else -1
    sums = np.zeros(site.rows, np.float64)
    count = 0
    for y in outputs:
        if site.layout == "columns-first" and len(site.shape) > 2:  # rows of all matrices of the batch
            wide = np.broadcast_to(y, np.broadcast_shapes(y.shape[:-2], site.shape[:-2]) + y.shape[-2:])
            flat = wide.swapaxes(-1, -2).reshape(-1, site.rows, y.shape[-2]).swapaxes(1, 2).reshape(-1, site.rows)
        else:
            flat = np.moveaxis(y, axis, -1).reshape(-1, site.rows)
        sums += flat.sum(0, dtype=np.float64)
        count += len(flat)
    return (sums / max(count, 1)).astype(np.float32)


def _exact_means(model: Model, sites: list[Site], feeds: list[dict[str, Array]]) -> dict[str, npt.NDArray[np.float32]]:
    """Mean output of each site in the float model."""
    segments = Segments(model.ir, sites)
    means = {site.name: np.zeros(site.rows, np.float32) for site in sites}
    for feed in feeds:
        for segment, boundary in segments.boundaries(feed):
            found = segment.read(boundary, [str(site.node.outputs[0].name) for site in segment.sites])
            for site in segment.sites:
                means[site.name] += _mean(site, [found[str(site.node.outputs[0].name)]]) / np.float32(len(feeds))
    return means


def _simulation(model: Model, sites: list[Site]) -> Model:
    """A copy with quantized activations, and behind each site the addition of a shift, zero so far."""
    copy = model.clone()
    own = {site.name: site for site in find_sites(copy.ir)}
    for site in (own[s.name] for s in sites):
        _append_shift(copy.graph, site)
    copy.plan, copy.weights, copy.bias_shift = Plan(), {}, {}
    InsertQDQ().run(copy, Silent())
    return copy


def _shift_name(site: Site) -> str:
    return f"{site.name}/bias_shift"


def _append_shift(graph: ir.Graph, site: Site) -> None:
    """Add a constant to the output of a site; the sum takes over the output's name (it may have a range)."""
    shape = (site.rows, *[1] * (len(site.shape) - 2)) if site.layout.startswith("conv") else (site.rows,)
    if site.layout == "columns-first" and len(site.shape) > 2:
        shape = (*site.shape[:-2], 1, site.shape[-1])
    name = _shift_name(site)
    shift = ir.val(name, const_value=ir.tensor(np.zeros(shape, np.float32), name=name))
    graph.register_initializer(shift)
    for node in site.users:
        if node.op_type == "Gather":
            continue
        old = node.outputs[0]
        kept, old.name = old.name, f"{old.name}/uncorrected"
        new = ir.val(kept, dtype=old.dtype, shape=old.shape)
        add = ir.node("Add", [None, shift], name=f"{kept}/correction", outputs=[new])
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        add.replace_input_with(0, old)
        graph.insert_after(node, add)


def _shifts(
    simulated: Model,
    model: Model,
    exact: dict[str, npt.NDArray[np.float32]],
    feeds: list[dict[str, Array]],
    progress: Progress,
) -> dict[str, npt.NDArray[np.float32]]:
    """Site by site: the mean output with all before quantized and corrected, and what it lacks."""
    by_name = {site.name: site for site in find_sites(simulated.ir)}
    segments = Segments(simulated.ir, [by_name[name] for name in by_name if name in model.weights])
    replaced = {
        str(site.weight.name): site.from_matrix(model.weights[name].decode())
        for name, site in by_name.items()
        if name in model.weights
    }
    boundaries = [segments.start(feed) for feed in feeds]
    shifts: dict[str, npt.NDArray[np.float32]] = {}
    for segment in progress.track(list(segments), "Correcting biases"):
        for site in (s for s in segment.sites if s.name in exact):
            shifts[site.name] = exact[site.name] - _quantized_mean(segment, site, boundaries, replaced)
            initializer = simulated.graph.initializers[_shift_name(site)]
            replaced[_shift_name(site)] = shifts[site.name].reshape(tuple(initializer.shape or ()))  # type: ignore[arg-type]
        boundaries = [segment.run(boundary, replaced) for boundary in boundaries]
        segment.drop()
    return shifts


def _quantized_mean(
    segment: Segment, site: Site, boundaries: list[Boundary], replaced: dict[str, Array]
) -> npt.NDArray[np.float32]:
    name = str(site.node.outputs[0].name)
    return _mean(site, [segment.read(boundary, [name], replaced)[name] for boundary in boundaries])
