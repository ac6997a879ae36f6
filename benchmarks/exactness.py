"""Do the transforms that are declared exact keep the function of real models?

    python benchmarks/exactness.py --assets DIR [--models a,b]

Every such pass, in the settings that recipes and papers use, on every model; printed are how much it changed, the
largest difference of an output over its largest magnitude on public samples (sums of float32 in another order make
1e-7 to 1e-5), the same for the model with weights that are off by a last bit, and seconds. 1e-3 is a failure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from assets import feeds

from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.errors import QcompilerError
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.pipeline import parse_pass
from qcompiler.progress import Silent

MODELS = ("digits_cnn", "face_rnet", "efficientnet_lite0", "mobilenet_v2", "minilm_l6_v2", "smollm2_135m")
PLAN = "uniform: spec = 'int4-sym-g64-fp16'"
# What searches or learns is cut short: that decides nothing about exactness.
PASSES = (
    "smooth", "smooth: sites = 'all', strength = 0.8", f"{PLAN} + awq: grid = 5", "scale-fold", "smooth-attention",
    f"{PLAN} + dual-scale: rounds = 2", "equalize", "equalize: clips = true",
    "center-norms", "rotate: heads = true", "rotate: heads = true, online = true, keys = true", "rotate: block = 64",
    "pca-split", "pca-split: heads = true", "channel-order", "split-panels",
    f"{PLAN} + svdquant: grid = 2, sweeps = 3", f"{PLAN} + lorc: rank = 8",
    f"{PLAN} + mobilequant: epochs = 1, samples = 4",
)  # fmt: skip
FAILURE = 1e-3


def perturbed(model: Model) -> Model:
    """A copy whose large weights are off by a last bit."""
    copy, rng = model.clone(), np.random.default_rng(0)
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1 << 10:
            array = tensor.numpy()
            off = (1 + rng.integers(-1, 2, array.shape, np.int8) * np.finfo(array.dtype).eps).astype(array.dtype)
            value.const_value = ir.tensor(array * off, name=value.name)
    return copy


def difference(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """max|y - y'| / max|y| over all outputs."""
    return max(float(np.abs(wanted[k] - found[k]).max() / max(np.abs(wanted[k]).max(), 1e-30)) for k in wanted)


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    failed = 0
    for name in args.models.split(","):
        model = load_onnx(args.assets / "models" / f"{name}.onnx")
        calib, public = feeds(args.assets, name, "calib"), feeds(args.assets, name, "public")
        if calib is None or public is None:
            continue
        model.calibration = Calibration.from_arrays({k: v[:32] for k, v in calib.items()}, model.ir)
        data = {k: v[: 1 if v.nbytes // len(v) > 2000 and v.ndim == 2 else 8] for k, v in public.items()}
        wanted = Runner(model.ir)(data)
        noise = difference(wanted, Runner(perturbed(model).ir)(data))
        print(f"\n{name}: a last bit of all weights: {noise:.1e}\n")
        print("| pass | changed | difference | s |\n|---|---|---|---|")
        for text in PASSES:
            work, start, changed = model.clone(), time.monotonic(), 0
            try:
                for part in text.split(" + "):
                    item = parse_pass(part, "benchmark")
                    item.requires(work)
                    changed = item.run(work, Silent()).changed
                found = difference(wanted, Runner(work.ir)(data))
            except QcompilerError as reason:
                print(f"| {text} | refused: {reason.what} | | |", flush=True)
                continue
            failed += found > FAILURE
            print(f"| {text} | {changed} | {found:.1e} | {time.monotonic() - start:.0f} |", flush=True)
    raise SystemExit(f"{failed} changed the function" if failed else 0)


if __name__ == "__main__":
    main()
