"""`qcompile run`: the raw outputs of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    artifact: Annotated[Path, typer.Argument(help="A compiled folder.", metavar="OUT")],
    inputs: Annotated[Path, typer.Option(metavar="X.npz", help="Arrays named as the inputs, samples first.")],
    outputs: Annotated[Path, typer.Option(metavar="Y.npz", help="File to write, arrays named as the outputs.")],
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a run.")] = None,
) -> None:
    """Run a compiled model on arrays from a file."""
    from qcompiler.artifact import load_artifact
    from qcompiler.commands.data import batches, read_samples, write_arrays
    from qcompiler.progress import Terminal

    loaded = load_artifact(artifact)
    samples = read_samples(inputs, loaded)
    feeds = batches(samples, loaded, batch)
    results = [loaded.run(feed) for feed in Terminal().track(feeds, "running")]
    write_arrays(outputs, samples.join(results))
