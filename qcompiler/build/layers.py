"""Loss of single sites with their final codes, on data that no pass has seen."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from qcompiler.build.score import rows
from qcompiler.evaluate.fidelity import output_loss
from qcompiler.graph.sites import Site
from qcompiler.measure.decoded import decoded_weight
from qcompiler.measure.segments import Segments
from qcompiler.measure.stream import activations
from qcompiler.model import Model
from qcompiler.progress import Progress
from qcompiler.target import Feeds


def weight_name(site: Site) -> str:
    """The initializer that holds a site's weight."""
    assert site.weight.name is not None
    return site.weight.name


def alone(model: Model, feeds: Sequence[Feeds], seconds: float, progress: Progress) -> dict[str, float]:
    """The model's loss with one site's weight rounded and all others float.

    Args:
        model: rounded, its graph still float.
        feeds: batches; losses are averaged over their samples.
        seconds: stop measuring after this time; where it is too short for all sites, some evenly spread over
            the graph are measured, the others left out.
        progress: shows how far.

    Returns:
        Site name -> loss (KL for logits, else normalised squared error), of sites where it is finite.
    """
    deadline = time.monotonic() + seconds
    chain = Segments(model.ir)
    total: dict[str, float] = {}
    seen: dict[str, int] = {}
    chosen: set[str] | None = None
    for feed in feeds:
        if time.monotonic() >= deadline:
            break
        begin = time.monotonic()
        boundary = chain.start(feed)
        reference = chain.run(boundary)
        if chosen is None:
            chosen = _affordable(model, chain, seconds / max(time.monotonic() - begin, 1e-9))
        for segment in progress.track(list(chain), "loss of single layers"):
            for site in segment.sites:
                if site.name in chosen and time.monotonic() < deadline:
                    change = {weight_name(site): decoded_weight(site, model.weights[site.name])}
                    after = segment.run(boundary, change)
                    outputs = chain.run(after, segment.index + 1, change)
                    loss = rows([feed]) * float(output_loss(reference, outputs))
                    total[site.name] = total.get(site.name, 0.0) + loss
                    seen[site.name] = seen.get(site.name, 0) + rows([feed])
            if time.monotonic() >= deadline:
                break
            boundary = segment.run(boundary)
            segment.drop()
    chain.drop()
    return {name: value / seen[name] for name, value in total.items() if math.isfinite(value)}


def _affordable(model: Model, chain: Segments, runs: float) -> set[str]:
    """Rounded sites, evenly spread over the graph, that so many runs of the model can pay for at half a run each."""
    names = [site.name for segment in chain for site in segment.sites if site.name in model.weights]
    most = max(1, int(min(2 * runs, len(names))))
    return set(names[:: max(1, -(-len(names) // most))])


def extremes(model: Model, limit: int) -> dict[str, list[float]]:
    """Smallest and largest number of every value that has a static range, over some calibration samples.

    Args:
        model: with calibration data; its graph is still float.
        limit: samples.
    """
    found: dict[str, list[float]] = {}
    for batch in activations(model, model.ranges, limit) if model.ranges else ():
        for name, array in batch.items():
            low, high = found.get(name, [float("inf"), float("-inf")])
            found[name] = [min(low, float(array.min())), max(high, float(array.max()))]
    return found
