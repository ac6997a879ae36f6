"""`qcompile bench`: speed against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.commands.output import print_facts, print_json, print_table

_TITLES = {
    "artifact": "the artifact",
    "ort_fp32": "ONNX Runtime, fp32 original",
    "ort_qdq": "ONNX Runtime, QDQ reference (model.onnx)",
    "ort_kernels": "ONNX Runtime, form of target onnx",
}


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
    rows = [[_TITLES[name], f"{1e3 * t:.3f}", f"{t / fastest:.2f}"] for name, t in ranked]
    print_table(["", "median ms", "times the fastest"], rows)
    best = f"{result.speedup_vs_ort_best:.2f} times"
    if result.best == "artifact":
        best = "1.00 times, as the artifact itself is ONNX Runtime's fastest form of the quantized model"
    print_facts(
        [
            ("speed against ORT on the fp32 original", f"{result.speedup_vs_ort_fp32:.2f} times"),
            ("speed against ORT's best quantized form", best),
            ("threads", str(result.threads)),
            ("interleaved runs of each", str(result.runs)),
            ("samples a run", str(result.batch)),
        ]
    )
