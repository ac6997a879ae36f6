"""Where a bias is corrected: behind products and convolutions, and behind norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.formats.base import Floats
from qcompiler.graph.norms import behind_norm
from qcompiler.graph.sites import Site
from qcompiler.passes.lower.bias import has_bias, is_biased, shaped
from qcompiler.passes.round.quantized_values import bounds_of, follower
from qcompiler.passes.round.rows import block_count
from qcompiler.pipeline import Refusal

Array = npt.NDArray[Any]
_POSITIONS = 512  # of each sample that a mean is taken over


@dataclass(frozen=True, eq=False)
class Place:
    """A value whose channels are shifted.

    Attributes:
        name: in `Model.bias_shift`.
        value: name of what is shifted.
        zeros: a shift of none, in the shape and type in which it is added.
        rows: the value as [positions, channels].
        choose: the shift [channels], from the value as it should be and as it is, both [positions, channels].
        bare: there is no bias yet, so that the shift is stored beside everything else.
    """

    name: str
    value: str
    zeros: Array
    rows: Callable[[Array], Array]
    choose: Callable[[Floats, Floats], Floats]
    bare: bool

    def by_channel(self, value: Array) -> Floats:
        """[positions, channels], evenly thinned out."""
        flat = self.rows(value)
        return np.asarray(flat[:: max(1, len(flat) // _POSITIONS)], np.float32)


def product_places(sites: Sequence[Site]) -> tuple[list[Place], list[Refusal]]:
    """A place behind each product and convolution, and why there is none."""
    refused = [Refusal(s.name, "a table has no output channels to correct") for s in sites if s.op == "Gather"]
    shared = [site for site in sites if site.op != "Gather" and len(site.users) > 1]
    refused += [Refusal(s.name, "several operations use it, whose means one shift cannot all mend") for s in shared]
    return [_behind_site(s) for s in sites if s.op != "Gather" and len(s.users) == 1], refused


def norm_places(sites: Sequence[Site]) -> tuple[list[Place], list[Refusal]]:
    """A place behind each norm that one of the sites reads; of unknown width there is none."""
    taken = {site.name for site in sites}
    values = dict.fromkeys(value for site in sites for value in site.activations if behind_norm(value))
    refused: list[Refusal] = []
    found: list[Place] = []
    for value in values:
        name, width = str(value.name), value.shape[-1] if value.shape else None
        if name in taken or not isinstance(width, int):
            why = "its name is also that of a site" if name in taken else "its width is unknown"
            refused.append(Refusal(name, why))
        else:
            zeros = np.zeros(width, (value.dtype or ir.DataType.FLOAT).numpy())
            found.append(Place(name, name, zeros, _last_axis, clear_mean, not is_biased(value)))
    return found, refused


def in_order(graph: ir.Graph, places: Sequence[Place]) -> list[Place]:
    """Sorted by where the graph makes the values."""
    order = {str(value.name): number for number, node in enumerate(graph) for value in node.outputs}
    return sorted(places, key=lambda place: order[place.value])


def _behind_site(site: Site) -> Place:
    activation = follower(site.node.outputs[0])
    bounds = None if activation is None else bounds_of(activation)
    low, high = bounds or (-np.inf, np.inf)

    def choose(exact: Floats, found: Floats) -> Floats:
        return best_shift(exact, found, (low, high))

    zeros = shaped(site, np.zeros(site.rows, np.float32)).astype((site.weight.dtype or ir.DataType.FLOAT).numpy())
    value = str(site.node.outputs[0].name)
    return Place(site.name, value, zeros, lambda y: _of_site(site, y), choose, not has_bias(site))


def _of_site(site: Site, y: Array) -> Array:
    """[positions, rows] of a site's output."""
    if site.layout.startswith("conv"):
        return np.moveaxis(y, 1, -1).reshape(-1, site.rows)
    if block_count(site) == 1:
        return y.reshape(-1, site.rows)
    # a batch of matrices: [..., *batch, positions, N] -> [positions, batch * N]
    batch = (*site.shape[:-2], site.shape[-1])
    return y.reshape(-1, block_count(site), *y.shape[-2:]).swapaxes(1, 2).reshape(-1, prod(batch))


def _last_axis(y: Array) -> Array:
    return y.reshape(-1, y.shape[-1])


def best_shift(exact: Floats, found: Floats, bounds: tuple[float, float]) -> Floats:
    """Of no shift, the mean difference and the median difference: the best for each channel.

    Judged by the absolute error: a few clipped outliers would otherwise decide for all other positions.
    """
    goal = np.clip(exact, *bounds)
    choices = [np.zeros(exact.shape[1]), (exact - found).mean(0), np.median(exact - found, 0)]
    errors = [np.abs(np.clip(found + shift, *bounds) - goal).mean(0) for shift in choices]
    return np.choose(np.argmin(errors, 0), choices).astype(np.float32)


def clear_mean(exact: Floats, found: Floats) -> Floats:
    """The mean difference mu of channels where it is at least half of the squared error: mu^2 >= sigma^2; 0 elsewhere.

    It takes the share mu^2 / (mu^2 + sigma^2) of that error away on the samples; on others a mean that is small beside
    the spread is mostly chance.
    """
    difference = np.asarray(exact - found, np.float64)
    mean = difference.mean(0)
    shift: Floats = np.where(np.square(mean) >= difference.var(0), mean, 0).astype(np.float32)
    return shift
