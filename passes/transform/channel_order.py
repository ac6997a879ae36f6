"""COMET: channels with outliers are put together, so that few blocks of them need more precision."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.budget import kept_sites
from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.panels import find_cuts
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import Floats, channel_reach, require_float
from qcompiler.passes.transform.panel_cutting import Order, absorbed, by_value, cut_alike, uncut
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class ChannelOrder(Pass):
    """Sort the channels that products read by their largest magnitudes, and cut off the blocks with outliers.

    A channel is an outlier if its largest magnitude is more than `theta` times the median of all channels. Sorted, n of
    them take ceil(n / block) blocks. These blocks become a panel, marked as the one that needs more precision, which
    planning passes heed (`uniform`: option `high`; activations of 8 bits wherever those of others are narrower); the
    rest becomes another. What produces the value absorbs the order where it can, elsewhere a Gather sorts the value.

    Source: COMET (2410.12168), fine-grained mixed-precision quantization. Its blocks have scales of their own; here all
    blocks of one precision share a scale for each row, so that a panel is a plain product.

    Attributes:
        block: channels.
        theta: how far outliers stand out; 0: all channels do, and `most` decides.
        most: share of the blocks that get more precision at most; those of the largest magnitudes.
        order: "channels", or "blocks": these are moved whole, as if nothing was sorted within them.
        keep: sites that are to stay float, and whole: globs on their names, or "embeddings".
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    hints: ClassVar[tuple[str, ...]] = ("keep",)
    block: int = 64
    theta: float = 4.0
    most: float = 0.25
    order: Literal["channels", "blocks"] = "channels"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = "pass 'channel-order'"
        if self.block < 1 or not 0 <= self.theta < np.inf or not 0 < self.most < 1:
            what = f"blocks of {self.block}, theta {self.theta}, at most {self.most} of the blocks"
            raise BadOption(what, where, "give blocks of 1 or more, theta of 0 or more, a share between 0 and 1")
        if self.order not in ("channels", "blocks"):
            raise BadOption(f"order cannot be '{self.order}'", where, "use channels or blocks")

    def requires(self, model: Model) -> None:
        """Float weights and calibration data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Sort and cut; metrics hold the blocks, by the name of the value that is cut."""
        sites = find_sites(model.ir)
        kept = kept_sites(sites, self.keep)
        panels = {site.name for cut in find_cuts(model.graph, sites) for site in cut.sum.sites}
        reasons = {s.name: self._reason(s, kept, panels) for s in sites}
        refused = [Refusal(name, reason) for name, reason in reasons.items() if reason is not None]
        readers = by_value(site for site in sites if reasons[site.name] is None)
        reach = self._reach(model, readers)
        changed, cuts = 0, dict[str, dict[str, Any]]()
        for value, group in progress.track(list(readers.items()), "ordering channels"):
            facts = self._sort_and_cut(model, group, reach[str(value.name)])
            if isinstance(facts, str):
                refused += [Refusal(site.name, facts) for site in group]
                continue
            cuts[str(value.name)], changed = facts, changed + len(group)
        return PassReport(self.registered_name(), changed, tuple(refused), {"panels": cuts})

    def _reason(self, site: Site, kept: Collection[str], panels: Collection[str]) -> str | None:
        """Why a site is not cut, or None."""
        if site.name in kept:
            return "it is to stay float"
        return "it is a panel already" if site.name in panels else uncut(site, self.block + 1)

    def _reach(self, model: Model, readers: Mapping[ir.Value, Sequence[Site]]) -> dict[str, Floats]:
        return channel_reach(model, {str(value.name): -1 for value in readers}, 100) if readers else {}

    def _sort_and_cut(self, model: Model, group: Sequence[Site], reach: Floats) -> dict[str, Any] | str:
        """What was done to the readers of a value, or why nothing."""
        if not np.isfinite(reach).all():
            return "its input is not finite on this data"
        alive = reach[reach > 0]
        outlier = reach > self.theta * (np.median(alive) if alive.size else 0.0)
        if not outlier.any():
            return f"no channel of its input reaches {self.theta:g} times as far as the median"
        order, needed = self._ordered(reach, outlier)
        blocks = -(-len(reach) // self.block)
        count = min(needed, int(self.most * blocks))
        if count == 0:
            return f"one block of {self.block} channels is more than {self.most:g} of its {blocks}"
        how = absorbed(model, order, group)
        high = count * self.block
        cut_alike(model, group, (high, len(reach) - high), order if how == "gather" else None, high=1)
        facts = {"columns": [high, len(reach) - high], "order": how, "outliers": int(outlier.sum())}
        return facts | {"blocks": blocks, "blocks with outliers": _touched(outlier, self.block), "high blocks": count}

    def _ordered(self, reach: Floats, outlier: np.ndarray) -> tuple[Order, int]:
        """The order, and how many blocks hold outliers then."""
        if self.order == "channels":
            order = np.argsort(-reach, kind="stable")
        else:
            whole = len(reach) // self.block * self.block  # what is left over stays last
            largest = reach[:whole].reshape(-1, self.block).max(1)
            places = np.arange(whole).reshape(-1, self.block)[np.argsort(-largest, kind="stable")]
            order = np.concatenate([places.ravel(), np.arange(whole, len(reach))])
        return order, _touched(outlier[order], self.block)


def _touched(outlier: np.ndarray, block: int) -> int:
    """How many blocks hold outliers."""
    return len(np.unique(np.flatnonzero(outlier) // block))
