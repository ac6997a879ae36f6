"""ResQ's bases within heads: the strongest directions of what heads hand on become channels with more precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import Site
from qcompiler.graph.topology import residual_streams
from qcompiler.measure.gram import gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.inner_rotation import between_weights, inputs_of_products
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.passes.transform.panel_cutting import absorbed, cut_alike, uncut
from qcompiler.passes.transform.power_basis import Floats, by_power

Facts = dict[str, dict[str, Any]]


def split_heads(model: Model, share: float, seed: int) -> tuple[Facts, list[Refusal]]:
    """Turn what lies between two linear layers to bases by power, in attention head by head, and cut its readers.

    The weights on both sides absorb the bases. Query heads that share a head of values share its basis. The strong
    channels of all heads are brought together in front of the product that reads them, where the graph runs if what
    writes them cannot be sorted (attention keeps heads apart).

    Source: ResQ (2412.14363), U_value. There it is of the second moments of values, which a cache holds; here of what
    the product reads, their averages over positions, because that is what is rounded.

    Args:
        model: whose weights and graph are changed.
        share: of each head's channels that get more precision.
        seed: of the rotations within both parts.

    Returns:
        Facts by the name of the value, and why a value is left alone.
    """
    streams = {value for stream in residual_streams(model.ir) for value in stream.values}
    found = {v: sites for v, sites in inputs_of_products(model.ir).items() if sites and v not in streams}
    folds = {v: fold for v in found if isinstance(fold := find_fold(model.ir, v, "rotate"), Fold)}
    values = {v: found[v] for v, fold in folds.items() if between_weights(fold)}
    facts: Facts = {}
    refused: list[Refusal] = []
    for part in gram_parts(values, lambda value: values[value][:1]):
        known = grams(model, [values[value][0] for value in part], enough_samples(model))
        for value in part:
            gram = known.get(values[value][0].name)
            moments = None if gram is None else gram.matrix[0].astype(np.float64)
            done = _split(model, value, values[value], moments, share, seed)
            if isinstance(done, Refusal):
                refused.append(done)
            else:
                facts[value.name or "?"] = done
    return facts, refused


def _split(
    model: Model, value: ir.Value, sites: Sequence[Site], moments: Floats | None, share: float, seed: int
) -> dict[str, Any] | Refusal:
    """Turn one value and cut the sites that read it."""
    name = value.name or "?"
    reason = next((reason for site in sites if (reason := uncut(site, 2)) is not None), None)
    if reason is not None:
        return Refusal(name, f"what reads it is not cut: {reason}")
    if moments is None or not np.isfinite(moments).all() or not np.trace(moments) > 0:
        return Refusal(name, "what its readers read is zero or not finite on this data")
    fold = find_fold(model.ir, value, "rotate")  # again: cutting has changed the graph
    assert isinstance(fold, Fold)
    bases: list[Floats] = []
    strong: list[int] = []
    captured = 0.0
    for number, block in enumerate(fold.blocks):
        size = block.shape[1]
        own = np.sum([moments[np.ix_(row, row)] for row in block], 0)
        high = round(share * size)
        if not 0 < high < size:
            return Refusal(name, f"a share of {share:g} of {size} channels is none or all")
        first, rest, ratio = by_power(own, high, seed + 2 * number)
        bases.append(np.concatenate([first, rest], 1))
        strong += block[:, :high].ravel().tolist()
        captured += ratio * float(np.trace(own))
    fold.rotate(bases)
    order = np.array([*sorted(strong), *sorted(set(range(fold.size)) - set(strong))])
    how = absorbed(model, order, sites)
    sizes = (len(strong), fold.size - len(strong))
    cut_alike(model, sites, sizes, order if how == "gather" else None, high=1)
    heads = sum(len(block) for block in fold.blocks)
    power = captured / float(np.trace(moments))
    return {"width": fold.size, "heads": heads, "high": len(strong), "power": power, "order": how, "cut": len(sites)}
