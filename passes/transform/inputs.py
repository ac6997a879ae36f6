"""What transforms of activations have in common: which values they may change, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption, PassRefused, Refusal
from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.statistics import channel_statistics
from qcompiler.measure.stream import activations, calibration_of
from qcompiler.model import Model

Floats = npt.NDArray[np.float64]
_TOKENS = 1 << 12  # more hardly change the largest |x| of a channel


def require_float(model: Model, *, data: bool) -> None:
    """Transforms change float weights, so they come before rounding.

    Raises:
        PassRefused: codes exist already, or data is needed and there is none.
    """
    if model.lowered or model.weights:
        raise PassRefused("the weights are rounded already", model.name, "put transforms before rounding")
    if data and model.calibration is None:
        raise PassRefused("it needs calibration data", model.name, "give --calib")


def layer_inputs(model: Model) -> dict[ir.Value, int]:
    """The values that layers with weights read, in topological order, each with its channel axis."""
    found: dict[ir.Value, int] = {}
    for site in find_sites(model.ir):
        axis = 1 if site.op in ("Conv", "ConvTranspose") else -1
        found |= {value: axis for value in site.activations if value not in found}
    return found


def weight_specs(model: Model, spec: str, where: str) -> dict[Site, QuantSpec]:
    """In which format each weight will be stored: that of the plan, or one for all where there is no plan yet.

    Args:
        model: float.
        spec: a format, such as "int4-sym-g64-fp16"; empty: the plan says it.
        where: who asks, for messages.

    Raises:
        BadOption: both or none of them say it, or the format does not exist.
    """
    if bool(spec) == bool(model.plan.sites):
        what = "there is a plan, which says the formats" if spec else "neither a plan nor an option says the format"
        fix = (
            "drop the option 'spec'"
            if spec
            else 'put it behind the plan, or give it an option such as spec = "int4-g64"'
        )
        raise BadOption(what, where, fix)
    if spec:
        return {site: parse_spec(spec) for site in find_sites(model.ir) if site.op != "Gather"}
    plans = ((site, model.plan.sites.get(site.name)) for site in find_sites(model.ir))
    return {site: plan.weight for site, plan in plans if plan is not None and plan.weight is not None}


def after_norm(fold: Fold) -> str | None:
    """None if only gains and biases of norms absorb the transform, else why not."""
    if any(edit.is_weight for edit in fold.writers):
        return "a layer produces it, not a norm"
    return None


def find_folds(
    model: Model,
    values: Mapping[ir.Value, int],
    accept: Callable[[Fold], str | None],
    *,
    insert: bool = False,
    loose: bool = False,
) -> tuple[list[Fold], list[Refusal]]:
    """The folds on some values, each part of the graph once; and why the other values have none."""
    folds: list[Fold] = []
    refused: list[Refusal] = []
    covered: set[ir.Value] = set()
    for value, axis in values.items():
        if value in covered:
            continue
        found = find_fold(model.ir, value, axis=axis, insert=insert, loose=loose)
        reason = accept(found) if isinstance(found, Fold) else found.reason
        if isinstance(found, Fold) and reason is None:
            folds.append(found)
            covered |= found.region.marks.keys()
        else:
            refused.append(Refusal(value.name or "?", reason or ""))
    return folds, refused


def check_percentile(percentile: float) -> None:
    """Raise BadOption for one that isn't in (0, 100]."""
    if not 0 < percentile <= 100:
        raise BadOption(f"a percentile of {percentile} does not exist", fix="give more than 0, at most 100")


def channel_reach(model: Model, axes: Mapping[str, int], percentile: float) -> dict[str, Floats]:
    """[channels] a value: the largest |x| of each channel, or a percentile of it, mean over batches.

    Args:
        model: with calibration data.
        axes: of the channels, by the name of a value.
        percentile: in (0, 100]; 100 is the largest.

    Raises:
        BadOption: the percentile isn't in (0, 100].
    """
    check_percentile(percentile)
    enough = enough_samples(model)
    if percentile == 100:
        return {name: s.absmax for name, s in channel_statistics(model, list(axes), axes, enough).items()}
    total: dict[str, Floats] = {}
    count: dict[str, int] = {}
    for name, array in _arrays(model, axes, enough):
        rows = np.abs(np.moveaxis(array, axes[name], -1)).reshape(-1, array.shape[axes[name]])
        total[name] = total.get(name, 0.0) + np.percentile(rows, percentile, axis=0)
        count[name] = count.get(name, 0) + 1
    return {name: total[name] / count[name] for name in total}


def _arrays(model: Model, axes: Mapping[str, int], limit: int | None) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for batch in activations(model, list(axes), limit):
        yield from batch.items()


def enough_samples(model: Model) -> int | None:
    """Samples that say enough of activations: of integer inputs (text) some thousand tokens; None, all, of others."""
    for feeds in calibration_of(model).batches(1, 1):
        length = max((a.size for a in feeds.values() if np.issubdtype(a.dtype, np.integer)), default=0)
        return max(1, _TOKENS // length) if length else None
    return None


def spread(reach: Floats) -> float:
    """How far the largest channel stands out: max / median over the channels that are not dead."""
    alive = reach[reach > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 1.0
