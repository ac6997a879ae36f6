"""What every number format at every site costs: one site at a time, judged by the model's own output.

Each probe quantizes one weight (nearest, clipped for the smallest squared error) and runs only what follows it.
Besides the loss it keeps a sketch of the output's change, whose products give the cross terms of a quadratic loss
model, G[a,b] = E dz_a^T F dz_b (Gauss-Newton form of CLADO's pair terms), for no further runs.

The loss is proportional to local output errors E||x dW^T||^2 as long as these are small:
loss[b] = loss[anchor] * error[b] / error[anchor]. So candidates of more than 5 bits are not measured but told from the
widest one that is ("tail"), and where even that would take too long each site is measured at one middle *anchor* only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from qcompiler.formats import Promoted, QuantSpec
from qcompiler.formats.fit import quantize
from qcompiler.formats.varied import VariedSpec
from qcompiler.graph.sites import Site
from qcompiler.measure.experiment import Experiment, Menus, Store, weight_formats
from qcompiler.measure.experiment import Option as Option
from qcompiler.measure.loss import PARTS, Kind, Reference
from qcompiler.measure.probes import Probes
from qcompiler.measure.quadratic import bounds, reliability
from qcompiler.model import Model
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Mode = Literal["full", "tail", "anchor", "fisher", "trace", "masked", "proxy"]
Effort = Literal["auto", "full", "tail", "anchor"]
_SMALL_ERRORS = 5  # bits: those of wider formats are small
_TRIAL = 1 << 17  # weights that are fitted to see how long fitting takes


@dataclass(frozen=True)
class Sensitivity:
    """Losses of single changes, and how changes add up.

    Attributes:
        sites: names, in the order asked for.
        candidates: for each site its formats, in the order asked for; None is float.
        loss: for each site float64 [candidates]: KL in nats, or normalised squared error, summed over outputs.
        noise: for each site float64 [candidates]: standard error of `loss` over disjoint parts of the data.
        sketches: for each site float32 [candidates, width]; products are the Gauss-Newton cross terms.
        mode: "full"; "tail" where wide candidates were extrapolated, "anchor" where most were; or how else the losses
            were made (`curvature`, `masked`, `proxy`), in units that differ from method to method.
        kinds: by output, what it was taken for.
        samples: used. probes: runs of the model's suffix. seconds: taken.
    """

    sites: tuple[str, ...]
    candidates: tuple[tuple[QuantSpec | None, ...], ...]
    loss: tuple[Floats, ...]
    noise: tuple[Floats, ...]
    sketches: tuple[npt.NDArray[np.float32], ...]
    mode: Mode
    kinds: Mapping[str, Kind]
    samples: int
    probes: int
    seconds: float

    def cross(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """The quadratic loss model: predicted loss of a choice x (one-hot per site) = 1/2 x^T G x.

        Returns:
            starts: int64 [sites + 1]; candidate k of site s is index starts[s] + k.
            G: float64, symmetric. The diagonal is 2 * loss as measured; entries between sites are products of
            sketches, bounded by the diagonal (|G_ab| <= sqrt(G_aa G_bb)); those within a site are 0.
        """
        starts = np.cumsum([0, *(len(row) for row in self.loss)])
        vectors = np.concatenate(self.sketches).astype(np.float32)
        diagonal = 2 * np.concatenate(self.loss)
        bound = bounds(diagonal)
        gram = np.clip((vectors @ vectors.T).astype(np.float64), -bound, bound)
        for low, high in pairwise(starts):
            gram[low:high, low:high] = 0
        np.fill_diagonal(gram, diagonal)
        return starts, gram

    def reliable_cross(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """`cross`, with the terms between two sites shrunk by how far disjoint parts of the outputs agree on them.

        Of some samples, the changes of many pairs of sites line up by chance, and a solver that may choose among
        millions of allocations finds the pairs that do. The result is positive semidefinite: no allocation is predicted
        to lose less than nothing.

        Returns:
            starts, G as in `cross`; entries within a site are products too (an allocation never takes two of them).
        """
        starts = np.cumsum([0, *(len(row) for row in self.loss)])
        losses = np.concatenate(self.loss)
        scale = np.sqrt(2 * np.where(np.isfinite(losses), np.maximum(losses, 0), 0))
        vectors = np.concatenate(self.sketches).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        gram = (units @ units.T).astype(np.float64) * reliability(starts, units) * np.outer(scale, scale)
        np.fill_diagonal(gram, 2 * losses)
        return starts, gram


def separable(
    sites: Sequence[Site],
    candidates: Menus,
    loss: Callable[[Site, QuantSpec], tuple[float, float]],
    mode: Mode,
    *,
    kinds: Mapping[str, Kind] | None = None,
    samples: int = 0,
    probes: int = 0,
    begin: float | None = None,
) -> Sensitivity:
    """Losses from a formula, without cross terms.

    Args:
        sites: of a model.
        candidates: as in `sensitivities`.
        loss: of a site in a format, and its standard error; called once for each. Float loses nothing.
        mode: which formula.
        kinds: by output, what it was taken for, if outputs played a part.
        samples: used.
        probes: runs of the model.
        begin: `time.monotonic()` when the work began.
    """
    begin = time.monotonic() if begin is None else begin
    specs = weight_formats(sites, candidates)
    tables: list[Floats] = []
    for site, row in zip(sites, specs, strict=True):
        known: dict[QuantSpec | None, tuple[float, float]] = {None: (0.0, 0.0)}
        known |= {spec: loss(site, spec) for spec in dict.fromkeys(row) if spec is not None}
        tables.append(np.array([known[spec] for spec in row], np.float64).reshape(-1, 2))
    none = tuple(np.zeros((len(row), 0), np.float32) for row in specs)
    return Sensitivity(
        tuple(site.name for site in sites), specs, tuple(t[:, 0] for t in tables), tuple(t[:, 1] for t in tables),
        none, mode, kinds or {}, samples, probes, time.monotonic() - begin,
    )  # fmt: skip


def sensitivities(
    model: Model,
    sites: Sequence[Site],
    candidates: Menus,
    *,
    samples: int | None = None,
    effort: Effort = "auto",
    seconds: float = 240.0,
    kinds: Mapping[str, Kind] | None = None,
    monotone: bool = True,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure the loss of every candidate format at every site.

    Args:
        model: float, with calibration data; where it has a cache every probe is kept, so a killed run goes on.
        sites: of `model`.
        candidates: formats by site name, or in the order of `sites`. Of a SitePlan the weight's format counts;
            None (float) loses nothing.
        samples: of the calibration data; None or 0: enough for 512 rows of output (fewer if they are long), at
            most one batch (16, more for small models); of texts longer than that the beginning.
        effort: "full" measures every candidate, "tail" those of at most 5 bits and tells wider ones from them, "anchor"
            one a site; "auto" is "tail" if `seconds` allow it, else "anchor".
        seconds: of all cores together that it may take (at the speed of the first runs).
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        monotone: let losses of one granularity never rise with the bits (pool adjacent violators): noise must
            not buy bits.
        progress: shows how far and how long.
    """
    experiment = Experiment(model, sites, candidates, samples, kinds)
    return measure_singles(experiment, effort=effort, seconds=seconds, monotone=monotone, progress=progress)


def measure_singles(
    experiment: Experiment,
    *,
    effort: Effort = "auto",
    seconds: float = 240.0,
    monotone: bool = True,
    progress: Progress | None = None,
) -> Sensitivity:
    """`sensitivities` on what another measurement goes on with."""
    begin = time.monotonic()
    sites, specs, store = experiment.sites, experiment.specs, experiment.store
    mode = effort if effort != "auto" else _mode(experiment, seconds)
    found: list[list[_Measured]] = [[] for _ in sites]
    of_output: Mapping[str, Kind] = {}
    for number in range(len(experiment.batches)):
        probes = experiment.probes(number)
        of_output = probes.reference.kinds
        for index in (progress or Silent()).track(experiment.order, "sensitivity"):
            found[index].append(_measure(store, probes, sites[index], specs[index], mode))
    results = [_join(parts, len(row)) for parts, row in zip(found, specs, strict=True)]
    loss = [r[0] for r in results]
    if monotone:
        loss = [_monotone(site, row, values) for site, row, values in zip(sites, specs, loss, strict=True)]
    return Sensitivity(
        tuple(site.name for site in sites), specs, tuple(loss), tuple(r[1] for r in results),
        tuple(r[2] for r in results), mode, of_output, experiment.samples, store.probes, time.monotonic() - begin,
    )  # fmt: skip


def _mode(experiment: Experiment, seconds: float) -> Mode:
    """Tail if the estimate fits into `seconds`; a killed run decides as before.

    Transforms are not counted: that they are offered too must not make plain formats worse known.
    """
    texts = [[str(spec) for spec in row if not isinstance(spec, VariedSpec)] for row in experiment.specs]

    def decide() -> dict[str, Array]:
        return {"full": np.array(_estimate(experiment) <= seconds)}

    return "tail" if bool(experiment.store.get(decide, "mode", seconds, texts)["full"]) else "anchor"


def _estimate(experiment: Experiment) -> float:
    """CPU seconds that measuring everything would take: half a run for each probe, and the fitting of the formats.

    Of all threads, not by the clock: a machine that is busy otherwise makes the same plan.
    """
    chain, batches, sites, specs = experiment.chain, experiment.batches, experiment.sites, experiment.specs
    if not batches or not sites:
        return 0.0
    counts = [len({spec for spec in row if spec is not None and not isinstance(spec, VariedSpec)}) for row in specs]
    boundary = chain.start(batches[0])
    reference = Reference(chain.run(boundary))
    begin = time.process_time()
    reference.losses(chain.run(boundary))
    run = time.process_time() - begin
    begin, done = time.process_time(), 1
    for site, row in zip(sites, specs, strict=True):
        spec = next((s for s in row if s is not None), None)
        if spec is not None and done < _TRIAL:
            matrix = site.matrix()[: max(1, _TRIAL // site.columns)]
            quantize(matrix, spec, method="mse")
            done += matrix.size
    each = (time.process_time() - begin) / done
    fits = sum(count * site.count for count, site in zip(counts, sites, strict=True))
    return len(batches) * (0.55 * run * sum(counts) + each * fits)


@dataclass
class _Measured:
    """Of one site and one batch: losses [candidates, parts], sketches [candidates, width]."""

    losses: Floats
    sketches: npt.NDArray[np.float32]


def _measure(store: Store, probes: Probes, site: Site, row: tuple[QuantSpec | None, ...], mode: Mode) -> _Measured:
    unique = sorted({s for s in row if s is not None}, key=lambda s: s.stored_bits(site.rows, site.columns))
    if not unique:
        return _Measured(np.zeros((len(row), PARTS)), np.zeros((len(row), probes.reference.width), np.float32))
    probed = _probed(unique, mode)
    measured = {spec: store.probe(probes, site, spec) for spec in probed}
    if len(probed) < len(unique):
        anchor, told = _plainest(probed)[-1], [spec for spec in unique if spec not in measured]
        losses, sketch = measured[anchor]
        texts = [str(spec) for spec in (anchor, *told)]
        local = store.get(
            lambda: {"errors": probes.local_errors(site, [anchor, *told])}, "local", probes.number, site.name, texts
        )["errors"]
        if local[0] > 0 and np.isfinite(local).all():
            for spec, ratio in zip(told, local[1:] / local[0], strict=True):
                measured[spec] = losses * ratio, sketch * np.float32(np.sqrt(ratio))
        else:  # nothing to go by
            measured |= {spec: store.probe(probes, site, spec) for spec in told}
    width = len(measured[unique[0]][1])
    nothing = (np.zeros(PARTS), np.zeros(width, np.float32))
    pairs = [nothing if spec is None else measured[spec] for spec in row]
    return _Measured(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.float32))


def _probed(unique: Sequence[QuantSpec], mode: Mode) -> Sequence[QuantSpec]:
    """The formats that are measured; the last of them is the one that others are told from."""
    if mode == "anchor":
        among = _plainest(unique)
        return [among[(len(among) - 1) // 2]]
    narrow = [spec for spec in unique if spec.bits <= _SMALL_ERRORS]
    return narrow if mode == "tail" and len(unique) - len(narrow) > 1 and narrow else unique


def _plainest(specs: Sequence[QuantSpec]) -> Sequence[QuantSpec]:
    """The formats without a transform, if there are any: from these others are told, whatever else is offered."""
    return [spec for spec in specs if not isinstance(spec, VariedSpec)] or specs


def _join(parts: Sequence[_Measured], options: int) -> tuple[Floats, Floats, npt.NDArray[np.float32]]:
    """Loss, its standard error, and the sketches of all batches side by side."""
    if not parts:
        return np.zeros(options), np.zeros(options), np.zeros((options, 0), np.float32)
    losses = np.concatenate([part.losses for part in parts], axis=1)
    with np.errstate(invalid="ignore"):  # of infinite losses
        noise = losses.std(1, ddof=1) / np.sqrt(losses.shape[1])
    sketches = np.concatenate([part.sketches for part in parts], axis=1) / np.float32(np.sqrt(len(parts)))
    return losses.mean(1), noise, sketches


def _monotone(site: Site, row: tuple[QuantSpec | None, ...], loss: Floats) -> Floats:
    """Within each family of formats (same granularity, symmetry, scales) the losses that never rise with bits."""
    families: dict[tuple[object, ...], list[int]] = {}
    for index, spec in enumerate(row):
        if spec is not None:
            variant, fmt = spec.variant if isinstance(spec, VariedSpec) else "", spec.format
            pair = (fmt.bits, fmt.high) if isinstance(fmt, Promoted) else ()  # of two widths, more may be promoted
            family = (type(fmt), pair, spec.granularity, spec.symmetric, spec.scale_dtype, variant)
            families.setdefault(family, []).append(index)
    fitted = loss.copy()
    for members in families.values():
        members.sort(key=lambda i: _stored(site, row[i]))
        if np.isfinite(loss[members]).all():
            fitted[members] = isotonic_regression(loss[members], increasing=False).x
    return fitted


def _stored(site: Site, spec: QuantSpec | None) -> int:
    assert spec is not None
    return spec.stored_bits(site.rows, site.columns)
