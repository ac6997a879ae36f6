"""ResQ: the directions in which a residual stream is strongest become channels of their own, with more precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Stream, find_stream
from qcompiler.graph.folds.widen import find_obstacle, widen
from qcompiler.graph.sites import Site, find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.measure.gram import gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.head_bases import split_heads
from qcompiler.passes.transform.inputs import enough_samples, require_float
from qcompiler.passes.transform.panel_cutting import by_value, cut_alike, uncut
from qcompiler.passes.transform.power_basis import Floats, by_power, mixed
from qcompiler.passes.transform.ready_streams import take_out, without_gains
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress


@dataclass(frozen=True)
class PCASplit(Pass):
    """Turn every residual stream so that its first channels hold most of the power, and cut its readers there.

    The basis is one for the whole stream: eigenvectors of the mean second moments of what its readers read, the
    strongest first, and within either part a rotation that shares the power out among its channels. The matrices that
    read the stream become two panels, [high | low]; the first is marked as the one that needs more precision, which
    planning passes heed (`uniform`: option `high`; activations of 8 bits wherever those of others are narrower). What
    writes the stream is turned and stays whole.

    Of all bases with so many channels at b + k bits and the rest at b, this one has the least expected error, if that
    goes with power * 4^-bits.

    With `heads` the same is done within heads to what attentions hand on (see `head_bases`).

    Source: ResQ (2412.14363), projection of the residual stream and of values. Its bases for keys are for a cache of
    few bits, which no graph holds: between rotary embeddings and the product with queries no weight absorbs them.

    QUAD (2503.19353) appends these directions to the stream instead, which becomes wider by them; the channels that
    were there keep the rest of the power, and all of them are of the narrow panel.

    Attributes:
        share: of the channels that get more precision.
        append: as QUAD has it.
        heads: split values within heads too.
        seed: of the rotations.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    share: float = 0.125
    append: bool = False
    heads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadOption(f"a share of {self.share} cannot be had", "pass 'pca-split'", "give more than 0, below 1")
        check_numbers(self, (), ("seed",))

    def requires(self, model: Model) -> None:
        """Float weights, data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Turn and cut; metrics hold for each stream its width, the high channels and the share of power in them."""
        heads, refused = split_heads(model, self.share, self.seed) if self.heads else ({}, [])
        turned: dict[str, Any] = {}
        changed = sum(facts["cut"] for facts in heads.values())
        for number, residual in enumerate(progress.track(residual_streams(model.ir), "Splitting by power")):
            name = residual.values[0].name or "?"
            found = self._turn(model, residual.values[0], number)
            if isinstance(found, Refusal):
                refused.append(found)
                continue
            stream, facts = found
            cut, kept = _cut(model, stream, facts["high"], append=self.append)
            turned[name], changed = facts | {"readers cut": cut}, changed + cut
            refused += kept
        metrics = {name: facts for name, facts in (("streams", turned), ("heads", heads)) if facts}
        return PassReport(self.registered_name(), changed, tuple(refused), metrics)

    def _turn(self, model: Model, value: ir.Value, number: int) -> tuple[Stream, dict[str, Any]] | Refusal:
        name = value.name or "?"
        stream = find_stream(model.ir, value)
        if isinstance(stream, Refusal):
            return stream
        if stream.keeps_mean:
            return Refusal(name, "LayerNorm sees the mean, which this basis changes: put 'center-norms' before")
        high = round(self.share * stream.width)
        if not 0 < high < stream.width:
            return Refusal(name, f"a share of {self.share:g} of {stream.width} channels is none or all")
        free = without_gains(model.ir, stream)
        if isinstance(free, Refusal):
            return free
        stream, products = free
        if self.append and (obstacle := find_obstacle(stream)) is not None:
            take_out(model.ir, products)
            return obstacle
        found = _moments(model, stream)
        total = float(np.trace(found))
        if not (np.isfinite(total) and total > 0):
            take_out(model.ir, products)
            return Refusal(name, "what its readers read is zero or not finite on this data")
        strong, weak, captured = by_power(found, high, self.seed + 2 * number)
        if self.append:
            rest = np.eye(stream.width) - strong @ strong.T
            widen(stream, np.concatenate([strong, rest @ mixed(stream.width, self.seed + 2 * number + 1)], 1))
        else:
            stream.rotate(np.concatenate([strong, weak], 1))
        inserted = [node.name for node in products]
        return stream, {"width": stream.width, "high": high, "power": captured, "inserted": inserted}


def _readers(model: Model, stream: Stream) -> list[Site]:
    nodes = {turn.node for turn in stream.readers}
    return [site for site in find_sites(model.ir) if nodes & set(site.users)]


def _moments(model: Model, stream: Stream) -> Floats:
    """float64 [width, width]: mean second moments of all values that are read, each in units of its power."""
    by_values = {site.activations: site for site in _readers(model, stream)}
    total = np.zeros((stream.width, stream.width))
    for chunk in gram_parts(by_values.values(), lambda site: [site]):
        for gram in grams(model, chunk, enough_samples(model)).values():
            matrix = gram.matrix.mean(0, dtype=np.float64)
            total += matrix / (np.trace(matrix) or 1.0)
    return total / max(len(by_values), 1)


def _cut(model: Model, stream: Stream, high: int, *, append: bool) -> tuple[int, list[Refusal]]:
    """Cut what can be cut of the readers; how many, and why not the rest."""
    readers = _readers(model, stream)
    reasons = {site.name: uncut(site, 2) for site in readers}
    groups = by_value(site for site in readers if reasons[site.name] is None)
    for group in groups.values():
        cut_alike(model, group, (high, stream.width if append else stream.width - high), high=1)
    refused = [Refusal(name, f"it is not cut: {reason}") for name, reason in reasons.items() if reason is not None]
    return sum(map(len, groups.values())), refused
