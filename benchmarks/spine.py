"""Compile the models of an assets folder and print what came out.

    python benchmarks/spine.py --assets DIR [--models a,b] [--targets onnx,cpu] [--budgets 4bits,8bits] [--out DIR]
        [--pipeline NAME] [--jsonl FILE]

Every compile is a process of its own (`qcompile --json`), so seconds, CPU seconds and peak memory are its own.
Calibration is the calib split, the figures are taken on the public split.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from assets import CPU_MODELS, MODELS, write_calibration
from evaluation import figures


def compile_once(
    model: Path, target: str, budget: str, calib: Path | None, out: Path, extra: list[str]
) -> dict[str, Any]:
    """One `qcompile` process: its --json object, CPU seconds, peak memory of the process tree."""
    command = [sys.executable, "-m", "qcompiler.cli", str(model), "--target", target, "--budget", budget]
    command += ["-o", str(out), "--json", *extra] + (["--calib", str(calib)] if calib else [])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result: dict[str, Any] = {
        "exit": done.returncode,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
    if done.returncode == 0:
        result |= json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the models of an assets folder")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--targets", default="onnx,cpu")
    parser.add_argument("--budgets", default="4bits,8bits")
    parser.add_argument("--pipeline", default="")
    parser.add_argument("--out", type=Path, default=Path("/tmp/qc-spine"))
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--no-figures", action="store_true")
    args, extra = parser.parse_known_args()
    if args.pipeline:
        extra += ["--pipeline", args.pipeline]
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models.split(","):
        calib = write_calibration(args.assets, name, args.out / "calib")
        for target in args.targets.split(","):
            if target == "cpu" and name not in CPU_MODELS:
                continue
            for budget in args.budgets.split(","):
                out = args.out / f"{name}-{target}-{budget}.qc"
                row: dict[str, Any] = {"model": name, "target": target, "budget": budget, "extra": extra}
                row |= compile_once(args.assets / "models" / f"{name}.onnx", target, budget, calib, out, extra)
                if row["exit"] == 0 and not args.no_figures:
                    import qcompiler

                    row["public"] = figures(name, qcompiler.load(out).run, args.assets)
                print(json.dumps(row), flush=True)
                if args.jsonl:
                    with args.jsonl.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
