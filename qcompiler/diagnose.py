"""Which layer is at fault: each layer's error alone, the error as it adds up, and what one more bit would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.artifact import Artifact
from qcompiler.artifact.original import original_of
from qcompiler.build.layers import alone, weight_name
from qcompiler.build.samples import Source, gather
from qcompiler.build.score import rows
from qcompiler.calibration import Calibration
from qcompiler.errors import BadModel
from qcompiler.evaluate.fidelity import output_loss
from qcompiler.formats import QTensor
from qcompiler.graph.functions import read_weight
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.decoded import decoded_weight
from qcompiler.measure.segments import Segments
from qcompiler.model import Model
from qcompiler.pipeline import Pipeline
from qcompiler.plan import Plan
from qcompiler.progress import Progress
from qcompiler.target import Feeds, Outputs

Weights = Mapping[str, npt.NDArray[Any]]
_WIDEST = 8  # bits


@dataclass(frozen=True)
class LayerError:
    """What one layer does to the model's output.

    All losses are those of the model (KL for logits, else normalised squared error) against its own float outputs
    on the given data.

    Attributes:
        name: of the site.
        format: of its weight.
        alone: loss with only this layer's weight quantized.
        accumulated: loss with this layer and all before it quantized.
        one_more_bit: how much the loss with all layers quantized falls if this weight gets one more bit, by the same
            way of rounding: its error shrinks as the step does; None at 8 bits.
        bytes_for_it: what that bit costs.
    """

    name: str
    format: str
    alone: float
    accumulated: float
    one_more_bit: float | None
    bytes_for_it: int | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """All layers in graph order, and the whole.

    Attributes:
        layers: one entry a quantized site.
        weights: loss with all weights quantized and activations float.
        artifact: loss of the artifact itself, activations included.
    """

    layers: Sequence[LayerError]
    weights: float
    artifact: float


def rebuild(artifact: Artifact, reference: Path | None, cache: Cache, progress: Progress) -> Model:
    """The model as it was before lowering: floats and codes side by side.

    The passes that changed the float graph are repeated; plan and codes are those of the artifact.

    Raises:
        BadModel: the original is gone, calibration data was never a file, or the passes do another thing now.
    """
    manifest, where = artifact.manifest, str(artifact.folder)
    model = original_of(artifact, reference)
    passes = Pipeline.from_toml(manifest["pipeline"]).passes
    if any("transformed" not in entry for entry in manifest["passes"]):
        raise BadModel("it was made by an earlier version of qcompiler", where, "compile again")
    again = [item for item, entry in zip(passes, manifest["passes"], strict=True) if entry["transformed"]]
    if again:
        model.calibration, model.cache = _calibration(artifact, model, progress), cache
        Pipeline(again).run(model, progress)
    model.plan = Plan.from_json(manifest["plan"])
    model.weights = _codes(ir.load(artifact.reference))
    for site in find_sites(model.ir):
        codes = model.weights.get(site.name)
        if codes is not None and not _are_near(site.matrix(), codes):
            raise BadModel("its passes give another result now than when it was made", where, "compile again")
    return model


def _calibration(artifact: Artifact, model: Model, progress: Progress) -> Calibration:
    manifest, where = artifact.manifest, str(artifact.folder)
    entry = manifest["calibration"]
    if entry["kind"] == "memory":
        fix = "compile with calibration data from a file"
        raise BadModel("its calibration data was not a file, so its transforms cannot be repeated", where, fix)
    samples = gather(Source.from_json(entry), model, manifest["seed"], progress)
    if samples.used.fingerprint != entry["fingerprint"]:
        raise BadModel(f"the calibration data {entry['path']} was changed since", where, "compile again")
    return samples.used


def _codes(lowered: ir.Model) -> dict[str, QTensor]:
    """Codes and scales of every site of a QDQ graph."""
    weights = (read_weight(value) for node in lowered.graph for value in node.outputs)
    return {weight.site: weight.qtensor() for weight in weights if weight is not None}


def _are_near(matrix: npt.NDArray[np.float32], codes: QTensor) -> bool:
    """Whether codes are of this matrix at all: the error of 2 bits is half of the numbers, that of others all."""
    return bool(np.square(codes.decode() - matrix).sum() <= 0.8 * np.square(matrix).sum())


def diagnose(artifact: Artifact, model: Model, feeds: Sequence[Feeds], progress: Progress) -> Diagnosis:
    """Measure every layer.

    Args:
        artifact: its own loss is measured too.
        model: rounded, its graph still float (what `rebuild` gives).
        feeds: batches of inputs; losses are averaged over their samples.
        progress: shows how far.
    """
    single = alone(model, feeds, float("inf"), progress)
    adding: dict[str, float] = dict.fromkeys(single, 0.0)
    gains: dict[str, float] = {}
    weights = whole = 0.0
    chain = Segments(model.ir)
    sites = [site for site in chain.sites if site.name in single]
    for feed in feeds:
        share = rows([feed]) / rows([*feeds])
        truth = chain.run(chain.start(feed))
        _accumulate(chain, model, feed, truth, share, adding, progress)
        all_rounded = {weight_name(s): decoded_weight(s, model.weights[s.name]) for s in sites}
        full = float(output_loss(truth, chain.run(chain.start(feed), 0, all_rounded)))
        _one_more(chain, model, feed, truth, full, share, all_rounded, gains, progress)
        weights += share * full
        whole += share * float(output_loss(truth, artifact.run(feed)))
    layers = [_row(s, model, single[s.name], adding[s.name], gains.get(s.name)) for s in sites]
    return Diagnosis(layers, weights, whole)


def _row(site: Site, model: Model, alone_: float, accumulated: float, gain: float | None) -> LayerError:
    spec = model.weights[site.name].spec
    cost = None
    if gain is not None:
        wider = spec.with_bits(spec.bits + 1)
        cost = (wider.stored_bits(site.rows, site.columns) - spec.stored_bits(site.rows, site.columns)) // 8
    return LayerError(site.name, str(spec), alone_, accumulated, gain, cost)


def _finer(site: Site, codes: QTensor) -> npt.NDArray[Any]:
    """The weights with the error that they have now, shrunk as much as one more bit shrinks the step."""
    bits, weight = codes.spec.bits, site.array()
    error = decoded_weight(site, codes).astype(np.float32) - weight
    return (weight + error * ((2**bits - 1) / (2 ** (bits + 1) - 1))).astype(weight.dtype)


def _accumulate(
    chain: Segments, model: Model, feed: Feeds, truth: Outputs, share: float, total: dict[str, float],
    progress: Progress,
) -> None:  # fmt: skip
    """Quantize one layer after the other, in graph order, and add `share` of the loss after each to `total`."""
    boundary, done = chain.start(feed), dict[str, npt.NDArray[Any]]()
    for segment in progress.track(list(chain), "accumulated error"):
        own = {weight_name(s): s.array() for s in segment.sites if s.name in total}
        for site in segment.sites:
            if site.name in total:
                done[weight_name(site)] = decoded_weight(site, model.weights[site.name])
                outputs = chain.run(segment.run(boundary, {**own, **done}), segment.index + 1, done)
                total[site.name] += share * float(output_loss(truth, outputs))
        boundary = segment.run(boundary, {**own, **done})


def _one_more(
    chain: Segments, model: Model, feed: Feeds, truth: Outputs, full: float, share: float, rounded: Weights,
    gains: dict[str, float], progress: Progress,
) -> None:  # fmt: skip
    """Add to `gains` `share` of how much the loss falls for one more bit, everything else staying quantized."""
    boundary = chain.start(feed)
    for segment in progress.track(list(chain), "one more bit"):
        for site in segment.sites:
            codes = model.weights.get(site.name)
            if codes is None or codes.spec.bits >= _WIDEST:
                continue
            change = {**rounded, weight_name(site): _finer(site, codes)}
            outputs = chain.run(segment.run(boundary, change), segment.index + 1, change)
            fall = full - float(output_loss(truth, outputs))
            gains[site.name] = gains.get(site.name, 0.0) + share * fall
        boundary = segment.run(boundary, rounded)
