"""What the acceptance tests of the methods share: fixtures, measuring at counted bytes, claims with their controls.

A test states its claim before it runs, measures each arm with three seeds (a seed draws the calibration samples), and
prints median and worst beside the bytes that each arm stores. A control has the same arms on a model in which the
cause of the gain is absent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import extract

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import feeds

from qcompiler.budget import bits_per_weight, stored_bytes
from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.evaluate.fidelity import FidelityMeter
from qcompiler.graph.sites import find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.measure.cache import Cache
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.pipeline import Pass, PassReport, Pipeline

SEEDS = (0, 1, 2)
_CACHE = Path("/tmp/qc-accuracy-cache")


@dataclass(frozen=True)
class Fixture:
    """A model with data to fit on and data to judge by.

    Attributes:
        model: float; its calibration is a random part of the calibration split.
        public: batches of the public split, which no pass ever sees.
    """

    model: Model
    public: Sequence[dict[str, Any]]

    def changed(self, change: Callable[[Model], object]) -> Fixture:
        """A copy whose model was edited: for controls."""
        model = self.model.clone()
        change(model)
        return replace(self, model=model)


@dataclass(frozen=True)
class Measured:
    """What came out of a pipeline.

    Attributes:
        bits: stored bits per weight, everything counted.
        bytes: stored constants.
        sqnr_db: of the outputs against float, on public data.
        kl: mean KL divergence of class scores, None where there are none.
        agreement: share of equal best classes, None likewise.
        reports: of the passes.
    """

    bits: float
    bytes: int
    sqnr_db: float
    kl: float | None
    agreement: float | None
    reports: tuple[PassReport, ...] = field(repr=False, default=())


def fixture(
    assets: Path, name: str, blocks: int | None = None, *, seed: int = 0, samples: int = 16, public: int = 8
) -> Fixture:
    """A model of an assets folder.

    Args:
        assets: folder as benchmarks/assets.py describes it.
        name: of the model.
        blocks: of a transformer only so many first blocks (pairs of sums into its residual stream); the outputs are
            then those of the products that read the stream next (query, key, value). None: the whole model.
        seed: draws the calibration samples.
        samples: so many of them.
        public: samples to judge by.
    """
    model = load_onnx(assets / "models" / f"{name}.onnx")
    if blocks is not None:
        model = replace(model, ir=first_blocks(model.ir, blocks))
    calib, judged = feeds(assets, name, "calib"), feeds(assets, name, "public")
    if calib is None or judged is None:
        raise SystemExit(f"{name} has no data")
    count = len(next(iter(calib.values())))
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:samples])
    model.calibration = Calibration.from_arrays({k: v[chosen] for k, v in calib.items()}, model.ir)
    model.cache = Cache(_CACHE)
    step = 1 if blocks is not None or name == "smollm2_135m" else 8
    batches = [{k: v[i : i + step] for k, v in judged.items()} for i in range(0, public, step)]
    return Fixture(model, batches)


def first_blocks(model: ir.Model, blocks: int) -> ir.Model:
    """The graph up to the products that read the residual stream behind its `blocks`-th block.

    Two sums into the longest residual stream are a block. The stream itself is no output, so that it can be rotated.
    """
    stream = residual_streams(model)[0]
    sums = [v for v in stream.values if (p := v.producer()) and p.op_type in ("Add", "Sum")]
    products = {user for site in find_sites(model) for user in site.users}
    todo, ends = [sums[2 * blocks - 1]], dict[ir.Value, None]()
    while todo:
        for node in todo.pop().consumers():
            if node in products:
                ends |= dict.fromkeys(node.outputs)
            elif not set(node.outputs) & set(stream.values):
                todo += node.outputs
    graph = extract(model.graph, list(model.graph.inputs), list(ends))
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    part.meta.update(model.meta)
    return part


def measure(fixture: Fixture, passes: Sequence[Pass]) -> Measured:
    """Run passes on a copy of the model, lower it, and compare it with the float model on the public data."""
    model = fixture.model.clone()
    reports = Pipeline(list(passes), verify=False).run(model)
    bits, size = bits_per_weight(model), stored_bytes(model)
    if not model.lowered:
        reports += Pipeline([InsertQDQ()], verify=False).run(model)
    original, lowered = Runner(fixture.model.ir), Runner(model.ir)
    meter = FidelityMeter()
    for batch in fixture.public:
        meter.add(original(batch), lowered(batch))
    found = meter.result()
    assert bits is not None
    assert found["sqnr_db"] is not None
    return Measured(bits, size, found["sqnr_db"], found["kl"], found["top1_agreement"], tuple(reports))


@dataclass
class Claim:
    """A claim, what was measured for it, and whether it holds.

    Attributes:
        title: the method, its source, and what is claimed.
        unit: of the values; larger is better.
    """

    title: str
    unit: str = "dB"
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict[tuple[str, str], list[float]])
    sizes: dict[tuple[str, str], list[int]] = field(default_factory=dict[tuple[str, str], list[int]])
    verdicts: list[str] = field(default_factory=list[str])

    def record(self, case: str, arm: str, measured: Measured | float) -> None:
        """One value of one arm, for the next seed."""
        plain = not isinstance(measured, Measured)
        self.values.setdefault((case, arm), []).append(measured if plain else measured.sqnr_db)
        if not plain:
            self.sizes.setdefault((case, arm), []).append(measured.bytes)
        bits = "" if plain else f" at {measured.bits:.3f} bits"
        print(f"  {case}: {arm}: {self.values[case, arm][-1]:.3f} {self.unit}{bits}", flush=True)

    def better(self, case: str, arm: str, than: str, by: float = 0.0) -> bool:
        """That `arm` beats another by more than `by`, in the median; the worst seed is printed."""
        gains = self._gains(case, arm, than)
        holds = median(gains) > by
        self._say(holds, f"{case}: {arm} better than {than} by more than {by:g} {self.unit}", gains)
        return holds

    def vanishes(self, case: str, arm: str, than: str, within: float) -> bool:
        """That `arm` gains at most `within` over another: the control, where the cause of the gain is absent."""
        gains = self._gains(case, arm, than)
        holds = median(gains) <= within
        self._say(holds, f"control {case}: {arm} gains at most {within:g} {self.unit} over {than}", gains)
        return holds

    def show(self) -> None:
        """Print the table and the verdicts, as Markdown."""
        print(f"\n## {self.title}\n")
        print(f"| case | arm | median {self.unit} | worst | bytes |\n|---|---|---|---|---|")
        for (case, arm), values in self.values.items():
            size = self.sizes.get((case, arm))
            shown = f"{round(median(size)):,}" if size else "-"
            print(f"| {case} | {arm} | {median(values):.3f} | {min(values):.3f} | {shown} |")
        print()
        for verdict in self.verdicts:
            print(f"- {verdict}")

    def _gains(self, case: str, arm: str, than: str) -> list[float]:
        return [a - b for a, b in zip(self.values[case, arm], self.values[case, than], strict=True)]

    def _say(self, holds: bool, what: str, gains: Sequence[float]) -> None:
        word = "HOLDS" if holds else "DOES NOT HOLD"
        self.verdicts.append(f"**{word}**: {what} (median {median(gains):+.3f}, worst {min(gains):+.3f})")


def assets_folder() -> Path:
    """What --assets says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, required=True)
    return parser.parse_args().assets
