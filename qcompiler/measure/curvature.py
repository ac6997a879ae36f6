"""How the loss curves at a model's weights, from gradients on the FX twin (needs the extra `torch`).

The loss is that of `loss`: KL to the model's own output, or normalised squared error. At the float weights its
gradient is exactly zero, so there are no gradients of it to square; its Hessian is the Fisher information of the
model's own answers, F = E[g g^T] with g the gradient of a random projection of the output (`JudgedTwin.scores`).
Two estimates of it:

`fisher`: the diagonal, one backward pass a sample; a loss of 1/2 sum g^2 dW^2 (as FGMP weighs its blocks).
`hessian_traces`: the trace of each site's block by Hutchinson's E[z^T H z], z of random signs, with two backward
passes a probe; a loss of trace / n * ||dW||^2 (HAWQ-V3).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import QuantSpec
from qcompiler.formats.varied import effective
from qcompiler.graph.sites import Site
from qcompiler.measure.experiment import Menus, Store
from qcompiler.measure.judged_twin import JudgedTwin
from qcompiler.measure.loss import Kind
from qcompiler.measure.sensitivity import Sensitivity, separable
from qcompiler.model import Model
from qcompiler.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
_LEAST_PROBES = 8


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the Fisher information, the mean over samples of squared gradients.

    Attributes:
        means: by site float32 [rows, ceil(columns / block)]: averages over runs of `block` columns.
        noise: by site the standard error of the site's sum over samples, relative to the sum.
        block: columns in a run; 1: every weight has its own.
        kinds, samples, seconds: as in `Sensitivity`.
    """

    means: Mapping[str, Floats]
    noise: Mapping[str, float]
    block: int
    kinds: Mapping[str, Kind]
    samples: int
    seconds: float

    def of(self, site: Site) -> Floats:
        """For every weight: float32 [rows, columns]."""
        return np.repeat(self.means[site.name], self.block, axis=1)[:, : site.columns]

    def total(self, site: Site) -> float:
        """The sum over a site's weights: the trace of its block of the Hessian."""
        return float(self.of(site).sum(dtype=np.float64))


@dataclass(frozen=True)
class Traces:
    """Traces of the Hessian's diagonal blocks.

    Attributes:
        trace: by site.
        noise: by site the standard error over probes.
        probes: how many random vectors were tried.
        kinds, samples, seconds: as in `Sensitivity`.
    """

    trace: Mapping[str, float]
    noise: Mapping[str, float]
    probes: int
    kinds: Mapping[str, Kind]
    samples: int
    seconds: float


def fisher(
    model: Model,
    sites: Sequence[Site],
    *,
    samples: int = 64,
    draws: int = 1,
    block: int = 1,
    kinds: Mapping[str, Kind] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fisher:
    """The diagonal of the Fisher information: a forward pass and one backward pass (or more) for each sample.

    Args:
        model: float, with calibration data; the result is cached if it has a cache.
        sites: of `model`.
        samples: of the calibration data, at most, evenly spread.
        draws: projections of each sample, a backward pass each.
        block: average over so many neighbouring columns, which takes less memory.
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        seed: of the projections.
        progress: shows how far and how long.

    Raises:
        MissingExtra: torch is not installed.
        BadModel: an operator has no differentiable form.
    """
    begin = time.monotonic()
    twin = JudgedTwin(model, sites, samples, 1, kinds)
    names = [site.name for site in sites]
    store = Store(model, "fisher", "spread", samples, sorted((kinds or {}).items()))

    def measure() -> dict[str, npt.NDArray[Any]]:
        sums, totals = _squares(twin, sites, (block, draws, seed), progress or Silent())
        return {f"mean.{i}": s / np.float32(len(totals)) for i, s in enumerate(sums)} | {"totals": totals}

    stored = store.get(measure, names, block, draws, seed)
    totals = stored["totals"]
    spread = totals.std(0, ddof=1) / np.sqrt(len(totals)) if len(totals) > 1 else np.zeros(len(names))
    noise = spread / np.maximum(totals.mean(0), 1e-300)
    means = {name: np.asarray(stored[f"mean.{i}"], np.float32) for i, name in enumerate(names)}
    relative = dict(zip(names, map(float, noise), strict=True))
    return Fisher(means, relative, block, twin.kinds, twin.samples, time.monotonic() - begin)


def hessian_traces(
    model: Model,
    sites: Sequence[Site],
    *,
    samples: int = 64,
    tolerance: float = 0.05,
    most: int = 100,
    kinds: Mapping[str, Kind] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Traces:
    """Traces by Hutchinson's method, for all sites at once.

    Args:
        model: float, with calibration data; where it has a cache every probe is kept, so a killed run goes on.
        sites: of `model`.
        samples: of the calibration data, at most, evenly spread.
        tolerance: stop when every site's standard error is below this share of its trace (after 8 probes at least).
        most: probes at most.
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        seed: of the random signs.
        progress: shows how far and how long.

    Raises:
        MissingExtra: torch is not installed.
        BadModel: an operator has no differentiable form.
    """
    begin = time.monotonic()
    twin = JudgedTwin(model, sites, samples, None, kinds)
    names = [site.name for site in sites]
    store = Store(model, "hutchinson", "spread", samples, sorted((kinds or {}).items()))
    found: list[npt.NDArray[np.float64]] = []
    error = np.zeros(len(names))
    for number in (progress or Silent()).track(range(most), "traces"):
        stored = store.get(lambda n=number: {"traces": _probe(twin, sites, (seed, n))}, names, seed, number)
        found.append(stored["traces"])
        if len(found) >= min(_LEAST_PROBES, most) and len(found) > 1:
            error = np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
            if (error <= tolerance * np.abs(np.mean(found, axis=0))).all():
                break
    mean = np.mean(found, axis=0)
    trace, noise = (dict(zip(names, map(float, v), strict=True)) for v in (mean, error))
    return Traces(trace, noise, len(found), twin.kinds, twin.samples, time.monotonic() - begin)


def fisher_sensitivity(sites: Sequence[Site], candidates: Menus, found: Fisher) -> Sensitivity:
    """Losses 1/2 sum_i F_ii dW_i^2 of every candidate, without cross terms; in the units of `sensitivities`."""
    begin = time.monotonic() - found.seconds

    def loss(site: Site, spec: QuantSpec) -> tuple[float, float]:
        value = 0.5 * float(np.einsum("ij,ij->", found.of(site), _error(site, spec) ** 2, dtype=np.float64))
        return value, value * found.noise[site.name]

    return separable(
        sites, candidates, loss, "fisher", kinds=found.kinds, samples=found.samples, probes=found.samples, begin=begin
    )


def trace_sensitivity(sites: Sequence[Site], candidates: Menus, found: Traces) -> Sensitivity:
    """HAWQ's losses trace / n * ||dW||^2 of every candidate, without cross terms; a negative trace counts as 0."""
    begin = time.monotonic() - found.seconds

    def loss(site: Site, spec: QuantSpec) -> tuple[float, float]:
        size = float(np.square(_error(site, spec), dtype=np.float64).sum()) / site.count
        return max(found.trace[site.name], 0.0) * size, found.noise[site.name] * size

    return separable(
        sites, candidates, loss, "trace", kinds=found.kinds, samples=found.samples, probes=found.probes, begin=begin
    )


def _error(site: Site, spec: QuantSpec) -> Floats:
    matrix = site.matrix()
    return effective(matrix, spec).decode() - matrix


def _squares(
    twin: JudgedTwin, sites: Sequence[Site], setting: tuple[int, int, int], progress: Progress
) -> tuple[list[Floats], npt.NDArray[np.float64]]:
    """Sums over samples of squared gradients [rows, blocks] by site, and each sample's total [samples, sites].

    Args:
        twin: with batches of one sample.
        sites: of its weights.
        setting: columns in a block, draws, seed.
        progress: shows how far.
    """
    import torch

    block, draws, seed = setting
    generator = torch.Generator().manual_seed(seed)
    sums = [np.zeros((site.rows, -(-site.columns // block)), np.float32) for site in sites]
    totals = np.zeros((len(twin.batches), len(sites)))
    for number, feeds in enumerate(progress.track(twin.batches, "fisher")):
        for score in twin.scores(feeds, generator, draws):
            gradients = torch.autograd.grad(score, twin.weights, retain_graph=draws > 1, materialize_grads=True)
            for i, (site, gradient) in enumerate(zip(sites, gradients, strict=True)):
                square = _matrix(site, gradient) ** 2 / np.float32(draws)
                sums[i] += np.add.reduceat(square, np.arange(0, site.columns, block), axis=1) / _widths(site, block)
                totals[number, i] += square.sum(dtype=np.float64)
    return sums, totals


def _widths(site: Site, block: int) -> Floats:
    """Columns in each run: the last one may be short."""
    starts = np.arange(0, site.columns, block)
    return np.minimum(block, site.columns - starts).astype(np.float32)


def _probe(twin: JudgedTwin, sites: Sequence[Site], seed: tuple[int, int]) -> npt.NDArray[np.float64]:
    """One z^T H z a site, averaged over the samples; every batch has signs of its own."""
    import torch

    generator = torch.Generator().manual_seed((seed[0] << 32) + seed[1])
    found, weight = np.zeros(len(sites)), 0
    for feeds in twin.batches:
        signs = [torch.randint(0, 2, w.shape, generator=generator).to(w.dtype) * 2 - 1 for w in twin.weights]
        slopes = torch.autograd.grad(twin.loss(feeds), twin.weights, create_graph=True, materialize_grads=True)
        inner: torch.Tensor = torch.stack([(g * z).sum() for g, z in zip(slopes, signs, strict=True)]).sum()
        bent = torch.autograd.grad(inner, twin.weights, materialize_grads=True)
        count = twin.count(feeds)
        found += np.array([float((h * z).sum()) for h, z in zip(bent, signs, strict=True)]) * count
        weight += count
    return found / max(weight, 1)


def _matrix(site: Site, gradient: torch.Tensor) -> Floats:
    return np.asarray(site.to_matrix(gradient.detach().numpy()), np.float32)
