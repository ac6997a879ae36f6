"""AWQ: scales per input channel, searched for the least error of what reads them in the format of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.errors import Refusal
from qcompiler.formats import parse_spec
from qcompiler.graph.folds import Fold
from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.transform.columns import Doubles, fold_all, stored_only
from qcompiler.passes.transform.inputs import (
    enough_samples,
    find_folds,
    layer_inputs,
    require_float,
    weight_specs,
)
from qcompiler.passes.transform.output_error import Importance, best_strength, judged
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress


@dataclass(frozen=True)
class AWQ(Pass):
    """Divide channel j of a layer's input by s_j = (mean|x_j|)^r; the weights that read it are multiplied.

    Channels that matter more are then rounded finer. The exponent r is searched for every value, among 0 (nothing),
    1/grid ... (grid - 1)/grid, for the least squared error of the outputs of all its readers, rounded to nearest in
    their formats. The producer of the value absorbs the division: norms, values of attention (with one scale for all
    query heads of a key-value head), the plain branch of gated products. Clipping belongs to rounding (`nearest`).

    Source: Lin et al., AWQ (2306.00978).

    Attributes:
        spec: format of all weights where there is no plan yet.
        grid: how many exponents.
        rows: of each weight that the error is measured on, about.
        importance: what `nearest` behind it will be told: how errors are weighed when scales of groups are fitted.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    spec: str = ""
    grid: int = 20
    rows: int = 256
    importance: Importance = "none"

    def __post_init__(self) -> None:
        check_numbers(self, ("grid", "rows"))
        if self.spec:
            parse_spec(self.spec)

    def requires(self, model: Model) -> None:
        """Float weights, calibration data, a plan or a format."""
        require_float(model, data=True)
        weight_specs(model, self.spec, "pass 'awq'")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Search all scales on the graph as it is, then fold them."""
        specs = weight_specs(model, self.spec, "pass 'awq'")
        folds, refused = find_folds(model, layer_inputs(model), stored_only({s: [spec] for s, spec in specs.items()}))
        axes = {fold.value.name or "": fold.axis for fold in folds}
        reach = channel_statistics(model, list(axes), axes, enough_samples(model))
        strengths = [k / self.grid for k in range(1, self.grid)]
        chosen: list[tuple[Fold, Doubles]] = []
        metrics: dict[str, list[float]] = {}
        for fold, judges in judged(model, folds, specs, progress, self.rows, self.importance):
            name = fold.value.name or ""
            found = best_strength(fold, judges, reach[name].magnitude, strengths)
            if found is None:
                refused.append(Refusal(name, "no scales lower the error of what reads it"))
                continue
            numbers, strength, error = found
            chosen.append((fold, numbers))
            metrics[name] = [strength, error]
        failed = fold_all(chosen)
        return PassReport(
            self.registered_name(),
            len(chosen) - len(failed),
            (*refused, *failed),
            {"strength_and_error": metrics} if metrics else {},
        )
