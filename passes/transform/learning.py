"""What passes have in common that learn an exact transform from the whole model's outputs.

They come after the plan, so that the formats are known, and before rounding: weights and activations are rounded in
the twin only, as the plan says. Nothing is kept that is not better on samples held back.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import MissingExtra, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.measure.stream import activations
from qcompiler.model import Model
from qcompiler.passes.round.lesson import Lesson
from qcompiler.passes.round.quantized_values import Target, choose_values
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.passes.transform.inputs import enough_samples, require_float
from qcompiler.pipeline import EXACT, Pass, PassReport, Refusal, check_numbers
from qcompiler.progress import Progress

if TYPE_CHECKING:
    import torch

    from qcompiler.passes.transform.transformed_twin import Ends, TransformedTwin

_TORCH = 200_000_000  # bytes of the program
_COPIES = 5  # of the weights: in the twin, transformed, rounded, and two gradients
_DECAY = (0.9, 0.95)  # of Adam's averages: there are only dozens of steps


@dataclass(frozen=True)
class Learning(Pass):
    """A pass that learns a transform.

    Attributes:
        epochs: passes over the data.
        samples: of the calibration data, at most; the last eighth is held back.
        tokens: for models of integer inputs, stop after about this many.
        batch: samples from all over the data that one step looks at.
        squared: judge class scores by their squared error too, instead of KL divergence (right for hidden states, which
            may look like scores).
        seed: of the order of the data.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    rates: ClassVar[tuple[str, ...]] = ()
    epochs: int = 8
    samples: int = 128
    tokens: int = 16384
    batch: int = 4
    squared: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, ("epochs", "samples", "tokens", "batch"), ("seed", *self.rates))

    def requires(self, model: Model) -> None:
        """Refuse a model without plan or data, or one that is rounded; say what to install."""
        require_float(model, data=True)
        if not any(plan.weight or plan.activation != "float" for plan in model.plan.sites.values()):
            what = "no formats are planned that it could learn for"
            raise PassRefused(what, model.name, "run it after a pass that plans, such as uniform or allocate")
        if importlib.util.find_spec("torch") is None:
            raise MissingExtra("torch", f"the pass '{self.registered_name()}'")

    def adds_bytes(self, model: Model) -> int:
        """Of torch, and of the twin's weights."""
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        return _TORCH + _COPIES * weights

    def learn(
        self,
        model: Model,
        twin: TransformedTwin,
        rates: Mapping[str, float],
        progress: Progress,
        *,
        all_of_it: bool = False,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    ) -> tuple[float, float]:
        """Descend; the loss on samples held back, before and after; if it became no smaller, the twin begins again.

        Args:
            model: of the twin.
            twin: whose parameters are learned.
            rates: by kind of parameter.
            progress: shows the steps.
            all_of_it: also the ranges are kept; else the loss after is that of the transform with ranges begun anew.
            make: the optimizer; Adam if None.

        Raises:
            PassRefused: there are too few samples to hold one back.
        """
        from qcompiler.passes.round.descent import Descent

        feeds = calibration_feeds(model, self.samples, self.tokens)
        if len(feeds) < 2:
            raise PassRefused("one sample is too few to hold some back", model.name, "give more calibration data")
        lesson = Lesson(model, feeds, "values" if self.squared else None)
        before = lesson.judge(twin)
        settings = repr((self, sorted(model.plan.to_json()["sites"].items())))
        lesson.learn(
            twin, Descent(twin, rates, averages=_DECAY, make=make), epochs=self.epochs, batch=self.batch,
            seed=self.seed, settings=settings, progress=progress, label=f"Learning ({self.registered_name()})",
        )  # fmt: skip
        if not all_of_it:
            twin.reset()
        after = lesson.judge(twin)
        if not after < before:
            twin.reset(transform=True)
        return before, after

    def report(self, losses: tuple[float, float], changed: int, refused: Sequence[Refusal]) -> PassReport:
        """What came out; nothing is changed where the loss has not become smaller."""
        before, after = losses
        kept = bool(after < before)
        metrics = {"held_back_loss_before": before, "held_back_loss_after": after, "kept": kept}
        return PassReport(self.registered_name(), changed if kept else 0, tuple(refused), metrics)


def static_targets(model: Model) -> list[Target]:
    """The values that will get a static grid, as `activation-ranges` will choose them."""
    static = [site for site in find_sites(model.ir) if _activation(model, site.name) == "static"]
    products = {node for site in static for node in site.users if node.op_type != "Gather"}
    return choose_values(model.graph, products, outputs=False)


def _activation(model: Model, name: str) -> str:
    return model.plan.sites[name].activation if name in model.plan.sites else "float"


def value_ends(model: Model, targets: Sequence[Target], shape: Callable[[str, int], tuple[int, ...]]) -> Ends:
    """Smallest and largest numbers of values over the calibration data.

    Args:
        model: with calibration data.
        targets: whose values are meant.
        shape: of the result, from the name of a value and its number of axes: 1 for axes that are taken together.

    Returns:
        float32 arrays by the name of a value, of these shapes; zero always counts.

    Raises:
        PassRefused: a value is infinite or NaN.
    """
    names = [str(target.value.name) for target in targets]
    found: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}
    for batch in activations(model, names, enough_samples(model)) if names else ():
        for name, array in batch.items():
            axes = tuple(k for k, size in enumerate(shape(name, array.ndim)) if size == 1)
            low, high = (end(axis=axes, keepdims=True, initial=0) for end in (array.min, array.max))
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise PassRefused("calibration makes it infinite or NaN", name, "check data and model")
            old = found.get(name, (low, high))
            found[name] = np.minimum(old[0], low), np.maximum(old[1], high)
    return found
