"""`qcompile run`: the raw outputs of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_ALL = "all"


def command(
    artifact: Annotated[Path, typer.Argument(help="A compiled folder.", metavar="OUT")],
    inputs: Annotated[Path, typer.Option(metavar="X.npz", help="Arrays named as the inputs, samples first.")],
    outputs: Annotated[Path, typer.Option(metavar="Y.npz", help="File to write, arrays named as the outputs.")],
    batch: Annotated[str | None, typer.Option(metavar="N", help="Samples a run: a number, or 'all'.")] = None,
) -> None:
    """Run a compiled model on arrays from a file."""
    import onnx_ir as ir

    from qcompiler.artifact import load_artifact
    from qcompiler.artifact.joined import run_all
    from qcompiler.artifact.loaded import is_artifact
    from qcompiler.calibration import Calibration
    from qcompiler.commands.data import samples_a_run, write_arrays
    from qcompiler.errors import OutputError
    from qcompiler.progress import Terminal

    if outputs.exists() and outputs.samefile(inputs):
        raise OutputError("it is the file with the inputs", str(outputs), "choose another file")
    if is_artifact(outputs.absolute().parent):
        raise OutputError("it lies in an artifact, which holds nothing else", str(outputs), "choose another folder")
    wanted = None if batch in (None, _ALL) else _number(str(batch))
    loaded = load_artifact(artifact)
    model = ir.load(loaded.reference)
    samples = Calibration.from_path(inputs, model)
    size = samples.count if batch == _ALL else wanted or samples_a_run(samples, loaded)
    write_arrays(outputs, run_all(loaded, model, samples, size, Terminal()))


def _number(text: str) -> int:
    from qcompiler.errors import BadOption

    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise BadOption(f"'{text}' is no number of samples", "--batch", f"give 1 or more, or '{_ALL}'")
    return int(text)
