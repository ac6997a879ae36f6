"""Rotation of residual streams by Hadamard matrices: outliers of single channels are shared out among all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Stream, find_stream
from qcompiler.graph.folds.rewrite import peak
from qcompiler.graph.topology import residual_streams
from qcompiler.model import Model
from qcompiler.passes.transform.hadamard import largest_block, rotation
from qcompiler.passes.transform.inner_rotation import turn_heads, turn_online
from qcompiler.passes.transform.inputs import require_float
from qcompiler.passes.transform.key_rotation import turn_keys
from qcompiler.passes.transform.ready_streams import without_gains
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn every residual stream by diag(+-1) H / sqrt(n), folded into the weights that write and read it.

    Gains of norms move into the weights behind them first. A table that is tied to the output layer cannot take the
    gain of the last norm: it stays as it is, and a product is inserted behind the lookup and before the output layer
    (two square matrices, which are quantized and counted like others). Streams between LayerNorms are turned by
    matrices that keep the mean over the channels, so that the norms stay; streams with norms behind the sums (BERT)
    and those that cross an activation are left alone, with the reason.

    Values that only pass an attention between two weights can be turned head by head as well, at no cost. What else
    products read, as behind gates and activations, is turned where the graph runs: by explicit small products
    (`qcompiler::Hadamard`) whose inverses are in the weights.

    Source: QuaRot (2404.00456) and, for the names R1 to R4, SpinQuant (2405.16406), with random matrices. QuaRot's
    code subtracts the mean of the embedding's rows also before RMS norms, which changes the function; here nothing is
    subtracted.

    Attributes:
        block: order of Hadamard matrices on the diagonal; 0: one matrix that mixes all channels.
        seed: of the signs.
        heads: turn values within heads too (R2).
        online: turn by explicit products what no folded matrix reaches (R4), and across heads.
        keys: turn queries and keys before their product (R3); of use where keys are kept in few bits.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    block: int = 0
    seed: int = 0
    heads: bool = False
    online: bool = False
    keys: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, (), ("seed",))
        if self.block < 0 or (self.block and largest_block(self.block) != self.block):
            fix = "use 0, or an order of Hadamard matrices such as 32, 64 or 128"
            raise BadOption(f"there is no Hadamard block of {self.block}", "pass 'rotate'", fix)

    def requires(self, model: Model) -> None:
        """Float weights, no plan yet."""
        require_float(model, data=False)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Turn what can be turned."""
        refused: list[Refusal] = []
        done: set[ir.Value] = set()
        turned: dict[str, Any] = {}
        for number, residual in enumerate(progress.track(residual_streams(model.ir), "Rotating")):
            value = residual.values[0]
            reason = self._turn(model.ir, value, number, turned, done)
            if reason is not None:
                refused.append(reason)
        heads, counts = turn_heads(model.ir, self.seed, done) if self.heads else ({}, {})
        online, kept = turn_online(model.ir, self.seed, self.block, done, counts) if self.online else ({}, [])
        keys, left = turn_keys(model.ir, self.seed) if self.keys else ({}, [])
        found = {"streams": turned, "heads": heads, "online": online, "keys": keys}
        metrics = {name: facts for name, facts in found.items() if facts}
        changed = sum(len(facts) for facts in metrics.values())
        return PassReport(self.registered_name(), changed, (*refused, *kept, *left), metrics)

    def _turn(
        self, model: ir.Model, value: ir.Value, number: int, turned: dict[str, Any], done: set[ir.Value]
    ) -> Refusal | None:
        name = value.name or "?"
        stream = find_stream(model, value)
        if isinstance(stream, Refusal):
            return stream
        block = self.block or stream.width
        if block == 1 or stream.width % block:
            return Refusal(name, f"{stream.width} channels are not made of Hadamard blocks of {block}")
        free = without_gains(model, stream)
        if isinstance(free, Refusal):
            return free
        stream, products = free
        before = _peak(stream)
        stream.rotate(rotation(stream.width, self.seed + number, self.block, keep_mean=bool(stream.keeps_mean)))
        done |= {*stream.values, *(node.inputs[0] for node in products if node.inputs[0] is not None)}
        facts = {"width": stream.width, "block": block, "writers": len(stream.writers), "readers": len(stream.readers)}
        turned[name] = facts | {
            "inserted": [node.name for node in products],
            "peak before": before,
            "peak after": _peak(stream),
        }
        return None


def _peak(stream: Stream) -> float:
    """That of the worst of the readers."""
    return max((peak(value) for value in {turn.constant.value for turn in stream.readers}), default=0.0)
