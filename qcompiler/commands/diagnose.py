"""`qcompile diagnose`: which layer is at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.commands.output import brief, print_facts, print_json, print_table, size


def command(
    artifact: Annotated[Path, typer.Argument(help="A compiled folder.", metavar="OUT")],
    data: Annotated[Path, typer.Option(metavar="X.npz", help="Arrays named as the inputs, samples first.")],
    reference: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The original, where the remembered file is gone.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples to measure with, spread over the data.")
    ] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Show each layer's error alone, the error as it adds up, and what one more bit would give."""
    from qcompiler.api import open_cache
    from qcompiler.artifact import load_artifact
    from qcompiler.commands.data import batches, read_samples
    from qcompiler.diagnose import diagnose, rebuild
    from qcompiler.progress import Terminal

    loaded, progress = load_artifact(artifact), Terminal()
    given = read_samples(data, loaded)
    taken = given.spread(samples)
    feeds = batches(taken, loaded, None)
    with open_cache(resume=True) as cache:
        found = diagnose(loaded, rebuild(loaded, reference, cache, progress), feeds, progress)
    if json:
        layers = [layer.to_json() for layer in found.layers]
        whole = {"weights": found.weights, "whole": found.artifact, "samples": taken.count}
        print_json({"artifact": str(artifact), **whole, "layers": layers})
        return
    rows = [
        [
            layer.name,
            layer.format,
            brief(layer.alone),
            brief(layer.accumulated),
            "-" if layer.one_more_bit is None else f"{layer.one_more_bit:+.2g}",
            "-" if layer.bytes_for_it is None else size(layer.bytes_for_it),
        ]
        for layer in found.layers
    ]
    print_table(["layer", "weights", "loss alone", "accumulated", "one more bit saves", "costs"], rows, left=2)
    more = "" if taken.count == given.count else f" of {given.count}, spread over them (--samples N for more)"
    facts = [("loss, all weights", brief(found.weights)), ("loss, the artifact itself", brief(found.artifact))]
    print_facts([("samples", f"{taken.count}{more}"), *facts])
