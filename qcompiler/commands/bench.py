"""`qcompile bench`: speed against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.commands.output import print_facts, print_json, print_table


def command(
    artifact: Annotated[Path, typer.Argument(help="A compiled folder.", metavar="OUT")],
    reference: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The original, where the remembered file is gone.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="X.npz", help="Inputs to run on; made at random by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples a run.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, metavar="S", help="Time for all runs together.")] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Time a compiled model beside ONNX Runtime on the original and on the same quantized model."""
    from qcompiler.artifact import load_artifact
    from qcompiler.bench import bench
    from qcompiler.commands.data import read_samples
    from qcompiler.progress import Terminal

    loaded = load_artifact(artifact)
    feeds = None
    if data is not None:
        feeds = next(read_samples(data, loaded).batches(batch))
    result = bench(loaded, reference, batch, seconds, Terminal(), feeds)
    if json:
        print_json({"artifact": str(artifact), **result.to_json()})
        return
    fastest = min(result.medians.values())
    ranked = sorted(result.medians.items(), key=lambda item: item[1])
    rows = [[name, f"{1e3 * t:.3f}", f"{t / fastest:.2f}"] for name, t in ranked]
    print_table(["", "median ms", "times the fastest"], rows)
    print_facts(
        [
            ("faster than ORT fp32", f"{result.speedup_vs_ort_fp32:.2f} times"),
            (f"faster than ORT best ({result.best})", f"{result.speedup_vs_ort_best:.2f} times"),
            ("threads, runs, batch", f"{result.threads}, {result.runs}, {result.batch}"),
        ]
    )
