"""`qcompile MODEL`: compile a model under a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.commands.output import brief, of_outputs, print_facts, print_json, print_table, size
from qcompiler.errors import BadOption

if TYPE_CHECKING:
    from qcompiler.api import CompileResult


_PARETO_POINTS = 25


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qcompiler {version('qcompiler')}")
        raise typer.Exit


def command(
    model: Annotated[Path, typer.Argument(help="An ONNX file.", metavar="MODEL")],
    target: Annotated[str, typer.Option(help="What the artifact runs on: cpu or onnx.")] = "cpu",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B",
            help="3.5bits (average stored bits a weight), 120MB, 8ms or 1.2Gbops; several hold. "
            "What the pipeline says by default; recipes: 4bits.",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Calibration data: .npz, .npy, a folder of images, a text file."),
    ] = None,
    preprocess: Annotated[str | None, typer.Option(help="How a folder of images becomes inputs.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json that turns a text file into inputs.")] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline", "--recipe", metavar="FILE", help="A TOML file or the name of a recipe; auto suits the model."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Weights to leave float: globs on their names, or 'embeddings'."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Folder to write (with --pareto a page); MODEL's name with .qc."
        ),
    ] = None,
    activations: Annotated[str, typer.Option(help="auto, float, static or dynamic.")] = "auto",
    effort: Annotated[
        str, typer.Option(help="low, default or high: how much time a recipe may take for accuracy.")
    ] = "default",
    resume: Annotated[bool, typer.Option(help="Go on from earlier measurements in the cache.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print plan and expected memory; write nothing but the cache of measurements."),
    ] = False,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Solve for 25 sizes: a table, and a plot in OUT or NAME.pareto.html.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Compile MODEL under a budget into a folder that runs, with a report that explains it."""
    from qcompiler.api import compile as compile_model
    from qcompiler.progress import Terminal

    page = output or Path(f"{model.stem}.pareto.html")
    if pareto and explain:
        raise BadOption("--explain prints one plan, --pareto all sizes", "qcompile", "give one of them")
    if pareto:
        from qcompiler.artifact.folder import check_file

        check_file(page, b": size against loss</title>")
    result = compile_model(
        model, target, budget or [], calib, pipeline, keep or [], output, seed, resume, activations, explain,
        Terminal(), preprocess, tokenizer, _PARETO_POINTS if pareto else 0, effort,
    )  # fmt: skip
    if pareto:
        _print_path(result, page, model.stem)
    if explain:
        _print_plan(result)
    if json:
        print_json(result.summary() | ({"pareto": _points(result), "plot": str(page)} if pareto else {}))
    elif not explain and not pareto:
        _print_summary(result)


def _print_path(result: CompileResult, page: Path, name: str) -> None:
    from qcompiler.artifact.folder import write_file
    from qcompiler.report.html import render_path

    points = _points(result)
    rows = [
        [
            f"{p['bits']:.3f}",
            size(p["bytes"]),
            *(brief(p[key], ".4g") for key in ("loss", "bound")),
            brief(p["gap"], ".2%"),
        ]
        for p in points
    ]
    print_table(["bits per weight", "stored", "predicted loss", "bound", "gap"], rows, left=0)
    write_file(page, render_path(name, result.target, points))
    print_facts([("plot", str(page))])


def _points(result: CompileResult) -> list[Mapping[str, Any]]:
    """The best answer of each size that is used: many of the sizes that were solved for have the same one."""
    points: Sequence[Mapping[str, Any]] = result.plan.solution.get("pareto", [])
    same = (list(group) for _, group in groupby(points, lambda point: point["bits"]))
    return [min(group, key=lambda point: point["loss"]) for group in same]


def _print_plan(result: CompileResult) -> None:
    rows = [
        [name, str(plan.weight) if plan.weight else "float", plan.activation_text]
        for name, plan in result.plan.sites.items()
    ]
    rows += [[name, "float (kept)", "float"] for name in result.plan.kept]
    print_table(["layer", "weights", "activations"], rows, left=3)
    print_facts(
        [
            *_bits(result),
            ("stored", f"{size(result.stored_bytes)} of {size(result.fp32_bytes)}"),
            ("predicted loss", _predicted(result)),
            *_proven(result),
            *_times(result),
            ("peak memory expected", size(result.peak_rss_bytes)),
        ]
    )


def _bits(result: CompileResult) -> list[tuple[str, str]]:
    """The average of bits per weight, and what is outside of it."""
    bits, left = result.bits_per_weight, result.uncounted
    facts = [("bits per weight", "none: no weight can be quantized" if bits is None else f"{bits:.3f}, scales counted")]
    if bits is None and result.plan.kept:
        facts = [("bits per weight", "none: all weights are kept")]
    if left:
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        stored = size(sum(weight.bytes for weight in left))
        facts.append(("not in the average", f"{stored} of float weights: '{left[0].where}' ({left[0].reason}){more}"))
    return facts


def _is_far_off(result: CompileResult) -> bool:
    """Whether the loss is ten times the predicted one, where that is a loss and not next to nothing."""
    if result.realised_loss is None or result.predicted_loss is None or result.plan.solution.get("loss_units"):
        return False
    return result.realised_loss > 10 * max(result.predicted_loss, 0.01)


def _predicted(result: CompileResult) -> str:
    """The predicted loss, and in what units if it is not comparable with a measured one."""
    units = result.plan.solution.get("loss_units")
    return brief(result.predicted_loss) + (f" (no loss of the model: {units})" if units else "")


def _proven(result: CompileResult) -> list[tuple[str, str]]:
    """How far the predicted loss may be from the least possible one."""
    from qcompiler.report.decision import decision

    found = decision(result.reports, result.plan.solution)
    plain = ", terms between layers left out" if found is not None and found["plain"] else ""
    return [("gap to the bound", brief(result.gap, ".2%") + plain)]


def _times(result: CompileResult) -> list[tuple[str, str]]:
    """What the latency budgets came to; nothing without any."""
    from qcompiler.report.decision import latencies

    facts: list[tuple[str, str]] = []
    for found in latencies(result.reports):
        name = "time of a run" if found["samples"] == 1 else f"time of {found['samples']} samples"
        took = f"{found['measured'] * 1e3:.4g} ms measured, budget {found['budget'] * 1e3:.4g} ms"
        if found["same_as_by_bops"]:
            beside = "the same allocation as by bit operations"
        else:
            faster = "faster" if found["faster_than_by_bops"] else "NOT faster"
            beside = f"{faster} than the allocation by bit operations ({found['by_bops'] * 1e3:.4g} ms)"
        facts.append((name, f"{took}; {beside}"))
    return facts


def _files(artifact: Path) -> str:
    """The target's own files, which may hold codes in wider containers than the QDQ reference counts."""
    from qcompiler.artifact import MANIFEST, REFERENCE, REPORT

    own = [p for p in artifact.iterdir() if p.name not in (REFERENCE, REPORT, MANIFEST)]
    return f"{', '.join(sorted(p.name for p in own))}: {size(sum(p.stat().st_size for p in own))}"


def _print_summary(result: CompileResult) -> None:
    print_table(["weights", "layers"], _by_format(result))
    from qcompiler.evaluate.classes import class_output

    fidelity, kinds = result.fidelity, result.output_kinds
    assert result.artifact is not None
    data = "held-back data" if result.held_back else "the calibration data that it was fitted to"
    fitted = "" if result.held_back else f", on {data}"
    ratio = result.fp32_bytes / result.stored_bytes if result.stored_bytes else 1.0
    facts = [
        *_bits(result),
        ("stored", f"{size(result.stored_bytes)} of {size(result.fp32_bytes)}, {ratio:.1f} times smaller"),
        ("files to ship", _files(result.artifact)),
        ("loss", f"{brief(result.realised_loss)} on {data}, predicted {_predicted(result)}"),
        ("SQNR", f"{brief(fidelity['sqnr_db'], '.1f')} dB{of_outputs(kinds)}{fitted}"),
    ]
    if _is_far_off(result):
        facts.append(("WARNING", "the loss is far above what was predicted: see 'qcompile diagnose' and the report"))
    if fidelity["top1_agreement"] is not None:
        answer = f"{fidelity['top1_agreement']:.1%}, KL {brief(fidelity['kl'])}"
        facts.append(("same top-1 answer", f"{answer}{of_outputs(kinds, class_output(kinds))}{fitted}"))
    facts += [
        *(_proven(result) if result.gap is not None else []),
        *_times(result),
        ("verified", f"in a fresh process, for target {result.target}"),
        ("took", f"{result.seconds:.0f} s, peak memory {size(result.peak_rss_bytes)}"),
        ("artifact", str(result.artifact)),
        ("report", str(result.artifact / "report.html")),
    ]
    print_facts(facts)


def _by_format(result: CompileResult) -> list[list[str]]:
    """How many layers have each format, widest first."""
    count: dict[tuple[int, str], int] = defaultdict(int)
    for plan in result.plan.sites.values():
        bits = plan.weight.bits if plan.weight else 32
        form = str(plan.weight) if plan.weight else "float"
        count[bits, form if plan.activation == "float" else f"{form}, {plan.activation_text} activations"] += 1
    return [[form, str(number)] for (_, form), number in sorted(count.items(), reverse=True)]
