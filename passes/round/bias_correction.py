"""BiasCorrection: give every output channel back the mean that quantization took from it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, in its empirical
form: E[W x - W~ x~] for each output channel, site by site, with all earlier sites quantized and corrected. Where a
Relu or Clip follows, the mean in front of it may be off where nobody looks; so a shift is judged by the error
behind it, and a channel that it would not help is left alone.

The same behind norms is the "DAC" of D2Quant (2602.02546), which looks at the norm behind each attention; here all
norms are places where it may help, and which channels do is its rule (`correction_places.clear_mean`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.formats import QTensor
from qcompiler.formats.base import Floats
from qcompiler.graph.sites import find_sites
from qcompiler.measure.decoded import decoded_weight
from qcompiler.measure.segments import Boundary, Segments
from qcompiler.model import Model
from qcompiler.passes.lower.bias import append_add
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.correction_places import Place, in_order, norm_places, product_places
from qcompiler.passes.round.streams import calibration_feeds, narrow_rows
from qcompiler.pipeline import Pass, PassReport, Refusal, check_numbers
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Fill `model.bias_shift` for the rounded sites; static ranges and narrow rows are simulated too.

    Attributes:
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        create: add a bias where an operation or a norm has none; that is 4 bytes a channel, which no budget has room
            for (the report says how many).
        places: what is corrected: "products" (and convolutions), "norms" that the rounded sites read, or "all".
    """

    samples: int = 32
    tokens: int = 4096
    create: bool = False
    places: Literal["products", "norms", "all"] = "products"

    def __post_init__(self) -> None:
        check_numbers(self, ("samples", "tokens"))

    def requires(self, model: Model) -> None:
        """Refuse a model that is lowered, planned but not rounded, or without data."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        planned = any(plan.weight is not None for plan in model.plan.sites.values())
        if not model.weights and not model.ranges and planned:
            raise PassRefused("nothing is quantized yet", where=model.name, fix="run it after a rounding pass")
        if model.calibration is None:
            raise PassRefused("bias correction needs calibration data", where=model.name)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Measure and store the shifts; metrics hold the largest one of each place, in standard deviations."""
        places, refused = self._places(model)
        if not places:
            return PassReport(self.registered_name(), 0, tuple(refused))
        feeds = calibration_feeds(model, self.samples, self.tokens)
        shifts, sizes = _shifts(model, places, feeds, progress)
        model.bias_shift.update(shifts)
        new = sum(place.zeros.nbytes for place in places if place.bare and place.name in shifts)
        metrics = {"largest_shift": sizes} | ({"new_bytes": new} if new else {})
        return PassReport(self.registered_name(), len(shifts), tuple(refused), metrics)

    def _places(self, model: Model) -> tuple[list[Place], list[Refusal]]:
        """Where to correct, in the order of the graph, and why not elsewhere."""
        sites = [site for site in find_sites(model.ir) if site.name in model.weights]
        places, refused = product_places(sites) if self.places != "norms" else ([], [])
        norms, without = norm_places(sites) if self.places != "products" else ([], [])
        places, refused = in_order(model.graph, [*places, *norms]), [*refused, *without]
        if self.create:
            return places, refused
        bare = sorted(place.name for place in places if place.bare)
        refused += [Refusal(name, "it has no bias, and a new one would be stored") for name in bare]
        return [place for place in places if not place.bare], refused


def _shifts(
    model: Model, places: list[Place], feeds: list[dict[str, Array]], progress: Progress
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Place by place: what it lacks when all before is quantized and corrected. A norm that lacks nothing has none."""
    simulated = _simulation(model, places)
    exact, found = (
        _Stream(m, places, model.weights.keys(), codes, feeds) for m, codes in ((model, {}), (simulated, model.weights))
    )
    shifts: dict[str, Floats] = {}
    sizes: dict[str, float] = {}
    for place in progress.track(places, "Correcting biases"):
        reference = exact.values(place)
        shift = place.choose(reference, found.values(place))
        if place.name in model.weights or shift.any():
            shifts[place.name] = shift
            sizes[place.name] = float(np.abs(shift).max() / max(reference.std(dtype=np.float64), 1e-12))
        found.replaced[_shift_name(place)] = shift.reshape(place.zeros.shape).astype(place.zeros.dtype)
    return shifts, sizes


def _simulation(model: Model, places: list[Place]) -> Model:
    """A copy with quantized activations, and behind each place the addition of a shift, zero so far."""
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    for place in places:
        shift = ir.val(_shift_name(place), const_value=ir.tensor(place.zeros, name=_shift_name(place)))
        copy.graph.register_initializer(shift)
        producer = values[place.value].producer()
        assert producer is not None
        append_add(copy.graph, producer, shift)  # the sum takes over the name
    rows = {name: replace(entry, weight=None) for name, entry in narrow_rows(model.plan).items()}
    copy.plan, copy.weights, copy.bias_shift = Plan(rows), {}, {}
    InsertQDQ().run(copy, Silent())
    return copy


def _shift_name(place: Place) -> str:
    return f"{place.name}/bias_shift"


class _Stream:
    """Calibration data in front of one segment of a model, moved on as needed; places must come in order.

    Attributes:
        replaced: initializer name -> array, used instead from here on.
    """

    def __init__(
        self,
        model: Model,
        places: list[Place],
        rounded: Collection[str],
        codes: Mapping[str, QTensor],
        feeds: list[dict[str, Array]],
    ) -> None:
        self._places = places
        self.replaced: dict[str, Array] = {}
        self._codes = codes
        self._segments = Segments(model.ir, [site for site in find_sites(model.ir) if site.name in rounded])
        self._boundaries: list[Boundary] = [self._segments.start(feed) for feed in feeds]
        self._position = -1
        self._seen: dict[str, Floats] = {}

    def values(self, place: Place) -> Floats:
        """What is at a place, [positions of all samples, channels], thinned out."""
        while self._position < 0 or not (self._is_here(place) or self._is_before(place)):
            self._step()
        if self._codes:  # what is before a place may have changed since
            return self._read([place])[place.name]
        if place.name not in self._seen:
            self._seen = self._read([p for p in self._places if self._is_here(p)] if self._is_here(place) else [place])
        return self._seen[place.name]

    def _is_here(self, place: Place) -> bool:
        return place.value in self._segments[self._position].made

    def _is_before(self, place: Place) -> bool:
        """It depends on no site: then it has been made before the first segment."""
        return place.value in self._boundaries[0]

    def _step(self) -> None:
        """Go behind a segment; decode the weights of the next one, and let go of those that nothing needs now."""
        if self._position >= 0:
            segment = self._segments[self._position]
            self._boundaries = [segment.run(boundary, self.replaced) for boundary in self._boundaries]
            segment.drop()
        self._position += 1
        rest = list(self._segments)[self._position :]
        later = frozenset[str]().union(*(segment.weights for segment in rest))
        self.replaced = {name: array for name, array in self.replaced.items() if name in later}
        for site in rest[0].sites:
            if site.name in self._codes:
                self.replaced[str(site.weight.name)] = decoded_weight(site, self._codes[site.name])

    def _read(self, places: list[Place]) -> dict[str, Floats]:
        names = list(dict.fromkeys(place.value for place in places))
        parts: dict[str, list[Floats]] = {place.name: [] for place in places}
        for boundary in self._boundaries:
            found = self._segments[self._position].read(boundary, names, self.replaced)
            for place in places:
                parts[place.name].append(place.by_channel(found[place.value]))
        return {name: np.concatenate(part) for name, part in parts.items()}
