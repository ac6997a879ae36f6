"""`qcompile eval`: how close an artifact is to the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.commands.output import brief, of_outputs, print_facts, print_json


def command(
    artifact: Annotated[Path, typer.Argument(help="A compiled folder.", metavar="OUT")],
    data: Annotated[Path, typer.Option(metavar="X.npz", help="Arrays named as the inputs, samples first.")],
    reference: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The original, where the remembered file is gone.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Samples a run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Compare a compiled model with the original on data: SQNR, KL, top-1 agreement."""
    from qcompiler.artifact import load_artifact
    from qcompiler.artifact.original import original_of
    from qcompiler.build.score import Score
    from qcompiler.commands.data import batches, read_samples
    from qcompiler.evaluate.classes import class_output
    from qcompiler.measure.runner import Runner
    from qcompiler.progress import Terminal

    loaded = load_artifact(artifact)
    samples = read_samples(data, loaded)
    runner = Runner(original_of(loaded, reference).ir)
    feeds = batches(samples, loaded, batch)
    score = Score(loaded.manifest.get("output_kinds"))
    for feed in Terminal().track(feeds, "evaluating"):
        score.add(feed, runner(feed), loaded.run(feed))
    found, judged = score.fidelity, class_output(score.kinds)
    if json:
        facts = {"samples": score.samples, "loss": score.loss, "fidelity": found, "class_output": judged}
        print_json({"artifact": str(artifact), **facts})
        return
    facts = [
        ("samples", str(score.samples)),
        ("loss", brief(score.loss)),
        ("SQNR", f"{brief(found['sqnr_db'], '.2f')} dB{of_outputs(score.kinds)}"),
    ]
    if found["top1_agreement"] is not None:
        agreed = f"{found['top1_agreement']:.2%}"
        facts += [("KL", brief(found["kl"])), ("same top-1 answer", f"{agreed}{of_outputs(score.kinds, judged)}")]
    print_facts(facts)
