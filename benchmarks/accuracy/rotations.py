"""Acceptance test of `rotate` (QuaRot 2404.00456; SpinQuant's R1, R2 and R4 with random matrices).

Claims, on the first blocks of smollm2_135m, on text that calibration never saw, at equal bytes but for the few
kilobytes of the explicit matrices:

1. peak and kurtosis of what products read shrink;
2. with int4 weights that have one scale a row, folded rotation (R1, R2) is better than none, for nearest and for GPTQ;
3. with int4 in groups of 32 it gains nothing worth having: groups do what rotation does;
4. with 4-bit activations it gains more than 3 dB, and the explicit matrices gain more again.

Control: weights drawn from a normal distribution and even gains, so that no channel stands out: folded rotation gains
at most 0.3 dB.

    python benchmarks/accuracy/rotations.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure

from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import Pass, Pipeline

ROW, GROUP = "int4-sym-channel-fp16", "int4-asym-g32-fp16"
BLOCKS, SAMPLES, PUBLIC = 2, 4, 4


def arms(seed: int) -> dict[str, list[Pass]]:
    """What is compared; every seed draws other signs too."""
    return {
        "none": [],
        "R1 in blocks of 64": [Rotate(64, seed)],
        "R1": [Rotate(0, seed)],
        "R1 R2": [Rotate(0, seed, heads=True)],
        "R1 R2 R4": [Rotate(0, seed, heads=True, online=True)],
    }


def plan(spec: str, bits: int | None = None) -> Uniform:
    """All products in one format; the table of the embedding stays float."""
    if bits is None:
        return Uniform(spec, embeddings="float")
    return Uniform(spec, "dynamic", "float", activation_bits=bits, activation_clip=0.9 if bits < 8 else 1.0)


CASES: dict[str, tuple[list[Pass], tuple[str, ...]]] = {
    "int4 a row, nearest": ([plan(ROW), Nearest()], ("none", "R1 in blocks of 64", "R1", "R1 R2")),
    "int4 a row, GPTQ": ([plan(ROW), GPTQ()], ("none", "R1 R2")),
    "int4 groups of 32, GPTQ": ([plan(GROUP), GPTQ()], ("none", "R1 R2")),
    "int4 a row, 8-bit activations, nearest": ([plan(ROW, 8), Nearest()], ("none", "R1 R2", "R1 R2 R4")),
    "int4 a row, 4-bit activations, nearest": (
        [plan(ROW, 4), Nearest()],
        ("none", "R1 in blocks of 64", "R1", "R1 R2", "R1 R2 R4"),
    ),
    "int4 a row, 4-bit activations, GPTQ": ([plan(ROW, 4), GPTQ()], ("none", "R1 R2", "R1 R2 R4")),
}
CONTROLS: dict[str, list[Pass]] = {
    "int4 a row, nearest": [plan(ROW), Nearest()],
    "int4 a row, 4-bit activations, nearest": [plan(ROW, 4), Nearest()],
}


def without_outliers(model: Model) -> None:
    """Weights from a normal distribution, as large as an initialisation makes them; gains of norms all one."""
    rng = np.random.default_rng(0)
    for site in find_sites(model.ir):
        size = 1.0 if site.op == "Gather" else site.columns**-0.5
        _set(site.weight, rng.normal(0, size, site.shape))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        gain = any(user.op_type in ("Mul", "RMSNormalization") for user in value.consumers())
        if gain and tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1:
            _set(value, np.ones(tuple(tensor.shape.numpy())))


def _set(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def shapes_of_inputs(case: Fixture, passes: list[Pass]) -> tuple[float, float]:
    """Medians over products: kurtosis over the channels of a token, and the largest channel over their size."""
    model = case.model.clone()
    Pipeline(passes, verify=False).run(model)
    names = [str(v.name) for site in find_sites(model.ir) for v in site.activations]
    kurtosis: list[float] = []
    peaks: list[float] = []
    for array in Runner(model.ir, outputs=names)(case.public[0]).values():
        rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
        size = np.sqrt(np.square(rows).mean(-1))
        rows, size = rows[size > 0], size[size > 0]
        kurtosis.append(float(((rows / size[:, None]) ** 4).mean()))
        peaks.append(float((np.abs(rows).max(-1) / size).mean()))
    return median(kurtosis), median(peaks)


def run(claim: Claim, label: str, case: Fixture, name: str, seed: int) -> None:
    """All arms of one case."""
    passes, wanted = CASES[name]
    for arm in wanted:
        claim.record(label, arm, measure(case, [*arms(seed)[arm], *passes]))


def judge(claim: Claim) -> None:
    """What was claimed."""
    for name in ("int4 a row, nearest", "int4 a row, GPTQ"):
        claim.better(name, "R1 R2", "none")
    claim.vanishes("int4 groups of 32, GPTQ", "R1 R2", "none", 1.0)
    claim.better("int4 a row, 4-bit activations, GPTQ", "R1 R2", "none", 3.0)
    claim.better("int4 a row, 4-bit activations, GPTQ", "R1 R2 R4", "R1 R2")
    claim.better("int4 a row, 8-bit activations, nearest", "R1 R2 R4", "none")
    for name in CONTROLS:
        claim.vanishes(f"no outliers: {name}", "R1 R2", "none", 0.3)


def main(assets: Path) -> None:
    claim = Claim("rotate: folded and explicit Hadamard rotations against outliers (QuaRot)")
    for seed in SEEDS:
        case = fixture(assets, "smollm2_135m", BLOCKS, seed=seed, samples=SAMPLES, public=PUBLIC)
        if seed == SEEDS[0]:
            for arm, passes in arms(seed).items():
                kurtosis, peak = shapes_of_inputs(case, passes)
                print(f"  inputs of products, {arm}: kurtosis {kurtosis:.2f}, peak {peak:.2f}", flush=True)
        for name in CASES:
            run(claim, name, case, name, seed)
        plain = case.changed(without_outliers)
        for name, passes in CONTROLS.items():
            for arm in ("none", "R1 R2"):
                found = measure(plain, [*arms(seed)[arm], *passes])
                claim.record(f"no outliers: {name}", arm, found)
    judge(claim)
    claim.show()


if __name__ == "__main__":
    main(assets_folder())
