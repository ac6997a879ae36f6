"""ResQ: the directions in which a residual stream is strongest become channels of their own, with more precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Stream, find_stream
from qcompiler.graph.folds.widen import find_obstacle, widen
from qcompiler.graph.sites import Site, find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.measure.gram import gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.hadamard import largest_block, rotation
from qcompiler.passes.transform.inputs import enough_samples, require_float
from qcompiler.passes.transform.panel_cutting import by_value, cut_alike, uncut
from qcompiler.passes.transform.ready_streams import take_out, without_gains
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress

Floats = npt.NDArray[np.float64]


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

    Source: ResQ (2412.14363), projection of the residual stream. Its bases for values and keys are not built: those of
    keys are no part of the graph's function before rotary embeddings.

    QUAD (2503.19353) appends these directions to the stream instead, which becomes wider by them; the channels that
    were there keep the rest of the power, and all of them are of the narrow panel.

    Attributes:
        share: of the channels that get more precision.
        append: as QUAD has it.
        seed: of the rotations.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    share: float = 0.125
    append: bool = False
    seed: int = 0

    def requires(self, model: Model) -> None:
        """Float weights, data, a share that leaves something on both sides."""
        if not 0 < self.share < 1:
            raise BadOption(f"a share of {self.share} cannot be had", "pass 'pca-split'", "give more than 0, below 1")
        require_float(model, data=True)
        check_numbers(self, (), ("seed",))

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Turn and cut; metrics hold for each stream its width, the high channels and the share of power in them."""
        refused: list[Refusal] = []
        turned: dict[str, Any] = {}
        changed = 0
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
        return PassReport(self.registered_name(), changed, tuple(refused), {"streams": turned} if turned else {})

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
        power, ascending = np.linalg.eigh(found)
        basis = ascending[:, ::-1]
        self._apply(stream, basis, high, self.seed + 2 * number)
        captured = float(power[-high:].sum()) / total
        inserted = [node.name for node in products]
        return stream, {"width": stream.width, "high": high, "power": captured, "inserted": inserted}

    def _apply(self, stream: Stream, basis: Floats, high: int, seed: int) -> None:
        """Turn the stream to a basis [width, width] whose first `high` columns are the strong ones, or append these."""
        strong = basis[:, :high] @ _mixed(high, seed)
        if self.append:
            rest = np.eye(stream.width) - strong @ strong.T
            widen(stream, np.concatenate([strong, rest @ _mixed(stream.width, seed + 1)], 1))
        else:
            weak = basis[:, high:] @ _mixed(stream.width - high, seed + 1)
            stream.rotate(np.concatenate([strong, weak], 1))


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


def _mixed(size: int, seed: int) -> Floats:
    """A rotation that shares power out among channels: a Hadamard matrix, a random one where none is known."""
    if size > 2 and largest_block(size) == size:
        return rotation(size, seed)
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return q * np.sign(np.diagonal(r))


def _cut(model: Model, stream: Stream, high: int, *, append: bool) -> tuple[int, list[Refusal]]:
    """Cut what can be cut of the readers; how many, and why not the rest."""
    readers = _readers(model, stream)
    reasons = {site.name: uncut(site, 2) for site in readers}
    groups = by_value(site for site in readers if reasons[site.name] is None)
    for group in groups.values():
        cut_alike(model, group, (high, stream.width if append else stream.width - high), high=1)
    refused = [Refusal(name, f"it is not cut: {reason}") for name, reason in reasons.items() if reason is not None]
    return sum(map(len, groups.values())), refused
