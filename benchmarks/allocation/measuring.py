"""How long does measuring take? Sensitivities with sketches (Gram) of real models, nothing cached.

    python benchmarks/allocation/measuring.py --assets DIR --models efficientnet_lite0,smollm2_135m
        [--formats A,B] [--effort full|tail|anchor|auto] [--again]

Without --formats: all options that `--target onnx` has for float activations. Calibration data as `qcompile` takes it.
With --again it is measured a second time from what the first left in its cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from qcompiler.calibration import Calibration
from qcompiler.capture.onnx import load_onnx
from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.passes.plan.candidates import menu, target_for
from qcompiler.plan import SitePlan
from qcompiler.progress import Terminal

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets import feeds

BITS = (2, 3, 4, 5, 6, 8)


def run(assets: Path, name: str, formats: list[QuantSpec], effort: str, folder: Path) -> None:
    """Measure one model and print the row."""
    model = load_onnx(assets / "models" / f"{name}.onnx")
    calibration = feeds(assets, name, "calib")
    if calibration is None:
        raise SystemExit(f"there is no data for {name}")
    model.calibration = Calibration.from_arrays(calibration, model.ir)
    model.cache = Cache(folder)
    sites = find_sites(model.ir)
    if formats:
        plans = [[SitePlan(spec) for spec in formats] for _ in sites]
    else:
        backend = target_for("onnx", "float")
        plans = [list(menu(backend, site, BITS, (), "float").plans) for site in sites]
    wall, cpu = time.monotonic(), time.process_time()
    found = sensitivities(model, sites, plans, effort=effort, progress=Terminal())  # type: ignore[arg-type]
    row = {"model": name, "sites": len(sites), "options": sum(map(len, plans)), "mode": found.mode}
    row |= {"samples": found.samples, "runs": found.probes, "cpu_s": round(time.process_time() - cpu, 1)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(row | {"wall_s": round(time.monotonic() - wall, 1), "peak_bytes": peak}), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="time of measuring")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--models", default="efficientnet_lite0,smollm2_135m")
    parser.add_argument("--formats", default="", help="separated by commas")
    parser.add_argument("--effort", default="auto", choices=["auto", "full", "tail", "anchor"])
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    formats = [parse_spec(text) for text in args.formats.split(",") if text]
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(1 + args.again):
                run(args.assets, name, formats, args.effort, Path(folder))


if __name__ == "__main__":
    main()
