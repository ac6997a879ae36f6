"""The engine of methods that learn codes part by part: AdaRound, AdaQuant, AutoRound and their like.

Each segment of the model (a block of a residual network) is made to give what the float model gives, from what the
rounded ones before it really give ("block reconstruction with quantized prefixes", BRECQ, 2102.05426). A method is
a choice: how codes are learned, with which optimizer and rates, and for how long.

Only passes that learn use this file; it needs torch when it runs.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.errors import MissingExtra, PassRefused
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.decoded import decoded_weight
from qcompiler.measure.loss import Kind
from qcompiler.measure.segments import Segment
from qcompiler.model import Model
from qcompiler.passes.round.streams import Streams, calibration_feeds
from qcompiler.pipeline import Pass, PassReport, Refusal, check_numbers
from qcompiler.plan import Plan
from qcompiler.progress import Progress

if TYPE_CHECKING:
    import torch

    from qcompiler.passes.round.tuned_twin import TunedTwin


@dataclass(frozen=True)
class Method:
    """What differs between the methods.

    Attributes:
        codes: "straight" or "soft" (see `learned_codes`).
        optimizer: "adam", or "sign": every parameter moves by its rate against the sign of its gradient.
        code_rate, scale_rate, bias_rate: at the first step, in steps of the grid (of AdaRound's variable), relative to
            the scales, in units of the outputs; 0: not learned.
        falling: whether the rates fall to 0 along a line.
        steps: for each segment.
        batch: samples a step.
        warm: share of the steps before soft codes are pressed to whole numbers.
        seed: of the order of samples.
    """

    codes: Literal["straight", "soft"]
    optimizer: Literal["adam", "sign"]
    code_rate: float
    scale_rate: float
    bias_rate: float
    falling: bool
    steps: int
    batch: int
    warm: float = 0.2
    seed: int = 0


def reconstruct(
    model: Model, method: Method, samples: int, tokens: int, progress: Progress
) -> tuple[dict[str, dict[str, float]], list[Refusal]]:
    """Learn `model.weights` of all planned sites, segment by segment, from the nearest codes where there are none.

    A segment keeps what it began with unless its error on samples that are held back becomes smaller. So does a weight
    that other segments use too: what one of them learns would be wrong for the others.

    Args:
        model: float graph with a plan and calibration data.
        method: how.
        samples: of the calibration data, at most.
        tokens: for integer inputs, no more samples than hold about this many.
        progress: shows how far and how long.

    Returns:
        By the name of a segment's first site: "before" and "after", its loss on the samples held back, how many these
        are ("held_back"; 0: there is only one sample, which it was learned from), and "sites". The weights that are
        used elsewhere too.
    """
    streams = Streams(model, calibration_feeds(model, samples, tokens))
    errors: dict[str, dict[str, float]] = {}
    refused: list[Refusal] = []
    for segment in progress.track(list(streams.segments), "Reconstructing"):
        sites = [site for site in segment.sites if _is_planned(model, site)]
        for site in sites:
            if site.name not in model.weights:
                spec = model.plan.sites[site.name].weight
                assert spec is not None
                model.weights[site.name] = quantize(site.matrix(), spec)
        shared = [site for site in sites if any(user.outputs[0].name not in segment.made for user in site.users)]
        for site in shared:
            refused.append(Refusal(site.name, "other segments use it too: it keeps the codes it has"))
            streams.replace(site, decoded_weight(site, model.weights[site.name]))
        own = [site for site in sites if site not in shared]
        if any(site.activation is not None for site in own):
            errors[own[0].name] = _learn(model, streams, segment, own, method)
        for site in own:
            streams.replace(site, decoded_weight(site, model.weights[site.name]))
        streams.advance(segment)
    return errors, refused


@dataclass(frozen=True)
class Reconstruction(Pass):
    """A pass that is a choice of `Method`.

    Attributes:
        steps: for each segment.
        batch: samples a step.
        samples: of the calibration data, at most.
        tokens: for models of integer inputs, stop after about this many.
        seed: of the order of samples.
    """

    makes_codes: ClassVar[bool] = True
    rates: ClassVar[tuple[str, ...]] = ("rate",)
    steps: int = 200
    batch: int = 8
    samples: int = 128
    tokens: int = 8192
    seed: int = 0

    @property
    @abstractmethod
    def method(self) -> Method:
        """What its options mean to the engine."""

    def __post_init__(self) -> None:
        check_numbers(self, ("steps", "batch", "samples", "tokens"), ("seed", *self.rates))

    def requires(self, model: Model) -> None:
        """Refuse a model without data, or one that is lowered; say what to install."""
        name = self.registered_name()
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if model.calibration is None:
            raise PassRefused(f"'{name}' needs calibration data", where=model.name, fix="give data, or use 'nearest'")
        if importlib.util.find_spec("torch") is None:
            raise MissingExtra("torch", f"the pass '{name}'")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.weights` (and `model.bias_shift`); metrics hold each segment's error before and after."""
        errors, refused = reconstruct(model, self.method, self.samples, self.tokens, progress)
        changed = sum(int(found["sites"]) for found in errors.values() if found["after"] < found["before"])
        return PassReport(self.registered_name(), changed, tuple(refused), {"segments": errors})


def _is_planned(model: Model, site: Site) -> bool:
    plan = model.plan.sites.get(site.name)
    return plan is not None and plan.weight is not None


def _learn(model: Model, streams: Streams, segment: Segment, sites: Sequence[Site], method: Method) -> dict[str, float]:
    """One segment."""
    from qcompiler.passes.round.tuned_twin import TunedTwin

    part, names = _part(model, streams, segment, sites)
    lesson = _Lesson(model, streams, segment)
    start, before = dict(part.weights), lesson.error(TunedTwin(part, ()))
    twin = TunedTwin(part, (), method.codes)
    _descend(twin, lesson, method)
    twin.commit(part)
    after = lesson.error(TunedTwin(part, ()))
    if after < before:
        model.bias_shift |= {names[name]: shift for name, shift in part.bias_shift.items()}
    else:
        part.weights = start
    model.weights |= {names[name]: tensor for name, tensor in part.weights.items()}
    return {"before": before, "after": min(before, after), "held_back": lesson.held, "sites": float(len(sites))}


class _Lesson:
    """What goes into a segment when all before it is rounded, and what should come out.

    Attributes:
        learned: samples to learn from.
        judged: samples to judge by, the last eighth; the same one where there is only one.
        held: how many of them are not learned from.
    """

    def __init__(self, model: Model, streams: Streams, segment: Segment) -> None:
        self._feeds = streams.rounded
        self.held = max(1, len(self._feeds) // 8) if len(self._feeds) > 1 else 0
        first = len(self._feeds) - self.held
        self.learned = range(first)
        self.judged = range(first, len(self._feeds)) if self.held else self.learned
        names = made_for_later(segment)
        final = {value.name for value in model.graph.outputs}
        self._kinds: list[Kind | None] = [None if name in final else "values" for name in names]
        self._wanted = [[found[name] for name in names] for found in map(segment.run, streams.exact)]

    def loss(self, twin: TunedTwin, index: int) -> torch.Tensor:
        """Of one sample."""
        from qcompiler.passes.round.distance import distance

        return distance(twin.outputs(self._feeds[index]), self._wanted[index], self._kinds)

    def error(self, twin: TunedTwin) -> float:
        """Mean loss of the samples to judge by."""
        import torch

        with torch.no_grad(), twin.step():
            return float(np.mean([self.loss(twin, index).item() for index in self.judged]))


def made_for_later(segment: Segment) -> list[str]:
    """The values of the next boundary that the segment itself makes."""
    return [name for name in segment.after if name in segment.made]


def _part(model: Model, streams: Streams, segment: Segment, sites: Sequence[Site]) -> tuple[Model, dict[str, str]]:
    """The segment as a model of its own, and the names that its sites have in the whole one."""
    graph = ir.convenience.extract(model.graph, list(segment.inputs), made_for_later(segment))
    functions = [function.clone() for function in model.ir.functions.values()]
    part = Model(ir.Model(graph, ir_version=model.ir.ir_version, functions=functions), model.name)
    mine = {str(site.weight.name): site.name for site in sites}
    for name, array in streams.replaced.items():  # rounded with an earlier segment
        if name in graph.initializers and name not in mine:
            graph.initializers[name].const_value = ir.tensor(np.asarray(array), name=name)
    names = {s.name: mine[str(s.weight.name)] for s in find_sites(part.ir) if str(s.weight.name) in mine}
    part.weights = {own: model.weights[name] for own, name in names.items()}
    part.plan = Plan({own: model.plan.sites[name] for own, name in names.items()})
    part.bias_shift = {own: model.bias_shift[name] for own, name in names.items() if name in model.bias_shift}
    return part, names


def _descend(twin: TunedTwin, lesson: _Lesson, method: Method) -> None:
    """The steps of a method on one segment."""
    from qcompiler.passes.round.descent import Descent

    rates = {"code": method.code_rate, "scale": method.scale_rate, "bias": method.bias_rate}
    descent = Descent(twin, rates, sign=method.optimizer == "sign")
    rng = np.random.default_rng(method.seed)
    for number in range(method.steps):
        share = number / method.steps
        for weight in twin.weights.values():
            weight.press(max(0.0, (share - method.warm) / (1 - method.warm)))
        chosen = rng.choice(lesson.learned, min(method.batch, len(lesson.learned)), replace=False)
        if not descent.step(
            lambda index: lesson.loss(twin, index), chosen.tolist(), 1 - share if method.falling else 1.0
        ):
            return
