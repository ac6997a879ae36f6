"""SpinQuant: the rotation of a residual stream, learned so that the rounded model gives what the float model does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Fold, Stream, find_stream
from qcompiler.graph.topology import residual_streams
from qcompiler.model import Model
from qcompiler.passes.transform.hadamard import rotation
from qcompiler.passes.transform.inner_rotation import head_folds, turn_heads
from qcompiler.passes.transform.learning import Learning, static_targets, value_ends
from qcompiler.pipeline import PassReport
from qcompiler.progress import Progress


@dataclass(frozen=True)
class SpinQuant(Learning):
    """Turn every residual stream by a random Hadamard matrix and then by one that is learned, both folded (R1).

    With `heads` values are turned within heads too, by matrices that are learned together with those of streams (R2).

    Descent runs on the orthogonal matrices; the twin rounds activations as the plan says, and what it gives is compared
    with the float model's outputs. Weights stay float meanwhile, as in the paper: they are rounded afterwards, and
    nearest codes jump about so much that matrices learned with them are no better. They are rounded in the twin where
    the plan rounds nothing else. If samples held back don't come closer, the Hadamard matrix stays.

    Where a table is tied to the output layer, products have to be inserted before the plan: run `rotate` first, and
    this with `start = "present"`.

    Source: Liu et al., SpinQuant (2405.16406).

    Attributes:
        rate: of the first steps: the largest angle, in radians, by which a plane turns.
        start: "hadamard": begin with a random one; "present": with the stream as it is.
        heads: also learn matrices within heads, one for all that share values.
    """

    rates: ClassVar[tuple[str, ...]] = ("rate",)
    rate: float = 0.1
    start: str = "hadamard"
    heads: bool = False

    def requires(self, model: Model) -> None:
        """Refuse as all passes that learn do, and an unknown start."""
        super().requires(model)
        if self.start not in ("hadamard", "present"):
            raise BadOption(f"unknown start '{self.start}'", "pass 'spinquant'", "use hadamard or present")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Turn what can be turned."""
        from qcompiler.passes.transform.cayley import CayleySGD
        from qcompiler.passes.transform.learned_turns import LearnedTurns
        from qcompiler.passes.transform.transformed_twin import TransformedTwin

        streams, refused = self._streams(model)
        heads = self._head_folds(model, streams, refused) if self.heads else []
        if not streams and not heads:
            return PassReport(self.registered_name(), 0, tuple(refused))
        turns, targets = LearnedTurns(streams, heads), static_targets(model)
        only_weights = all(plan.activation == "float" for plan in model.plan.sites.values())
        ends = value_ends(model, targets, turns.shape)
        twin = TransformedTwin(model, turns, targets, ends, round_weights=only_weights)
        losses = self.learn(
            model, twin, {"turn": self.rate}, progress, make=lambda groups: CayleySGD(groups, turns.keeping_the_mean())
        )
        report = replace(self.report(losses, 0, refused), changed=len(streams) + len(heads))
        if report.metrics["kept"]:
            turns.fold()
        return report

    def _streams(self, model: Model) -> tuple[list[Stream], list[Refusal]]:
        """The streams that can be turned, at their start; and why others cannot."""
        streams: list[Stream] = []
        refused: list[Refusal] = []
        for number, residual in enumerate(residual_streams(model.ir)):
            stream = find_stream(model.ir, residual.values[0])
            stuck = [stream] if isinstance(stream, Refusal) else stream.fold_gains()
            refused += stuck[:1]
            if isinstance(stream, Stream) and not stuck:
                if self.start == "hadamard":
                    stream.rotate(rotation(stream.width, self.seed + number, keep_mean=bool(stream.keeps_mean)))
                streams.append(stream)
        return streams, refused

    def _head_folds(self, model: Model, streams: list[Stream], refused: list[Refusal]) -> list[Fold]:
        """The values that can be turned within heads, at their start; why others cannot goes to `refused`."""
        done = {value for stream in streams for value in stream.values}
        if self.start == "hadamard":
            turn_heads(model.ir, self.seed, set(done))
        found: list[Fold] = []
        for value, fold in head_folds(model.ir, done):
            shared = [edit.constant for edit in fold.region.edits.values() if edit.constant.shared]
            if shared:
                why = f"'{shared[0].value.name}' is not learned with it: {shared[0].shared}"
                refused.append(Refusal(value.name or "?", why))
            else:
                found.append(fold)
        return found
