"""What users call: `compile`, `load`, `capture`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler import registry
from qcompiler.artifact import check_output, load_artifact
from qcompiler.budget import bits_per_weight, parse_budget, stored_bytes
from qcompiler.build.emit import emit
from qcompiler.build.lowering import Lowering, lower
from qcompiler.build.memory import expected_peak
from qcompiler.build.recipe import Options, budgets_of, build_pipeline, check_order
from qcompiler.build.samples import Samples, Source, gather
from qcompiler.build.suitable import check_suitable
from qcompiler.capture.normalize import DEFAULTS_KEY
from qcompiler.capture.onnx import load_onnx
from qcompiler.capture.torch import capture
from qcompiler.errors import BadOption
from qcompiler.folders import temporary_folder
from qcompiler.graph.uncounted import Uncounted, uncounted_weights
from qcompiler.measure.cache import Cache
from qcompiler.measure.loss import Kind
from qcompiler.model import Model
from qcompiler.pipeline import PassReport, Pipeline
from qcompiler.plan import Plan
from qcompiler.progress import Progress, Silent
from qcompiler.target import Backend, Feeds, Outputs, require_toolchain

if TYPE_CHECKING:
    from qcompiler.calibration import Calibration

__all__ = ["CompileResult", "capture", "compile", "load"]

_SUMMARY = (
    "artifact", "target", "budget", "bits_per_weight", "stored_bytes", "predicted_loss", "lower_bound", "gap",
    "fidelity", "verified", "seconds", "peak_rss_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class CompileResult:
    """What came out of a compilation.

    Attributes:
        artifact: the folder; None after `explain`.
        target: name of the backend.
        budget: as given, or as the pipeline has it.
        bits_per_weight: stored bits, scales and zero points counted, as a "bits" budget counts; None where no weight
            is in that average.
        uncounted: weights that are outside it because no plan can quantize them, with reasons.
        stored_bytes: of all constants, as a "MB" budget counts.
        fp32_bytes: of the original's constants.
        predicted_loss, lower_bound, gap: of the allocation; None for a plan made without a solver.
        realised_loss: the same loss of the finished artifact on held-back data, if `held_back` is not 0.
        fidelity: sqnr_db, kl and top1_agreement against the original, on held-back data, if `held_back` is not 0.
        verified: the artifact was run in a fresh process and equals its QDQ reference.
        seconds: wall time.
        peak_rss_bytes: peak memory; after `explain` what is expected.
        plan: the decisions.
        reports: one a pass.
        output_kinds: output of floats -> what it is; kl and top1_agreement are of the one with class scores.
        held_back: samples that were judged by and not measured on; 0: too few, judged by the calibration samples.
    """

    artifact: Path | None
    target: str
    budget: tuple[str, ...]
    bits_per_weight: float | None
    stored_bytes: int
    fp32_bytes: int
    predicted_loss: float | None
    lower_bound: float | None
    gap: float | None
    realised_loss: float | None
    fidelity: dict[str, float | None]
    verified: bool
    seconds: float
    peak_rss_bytes: int
    plan: Plan
    reports: Sequence[PassReport] = ()
    held_back: int = 0
    uncounted: Sequence[Uncounted] = ()
    output_kinds: Mapping[str, Kind] = field(default_factory=dict[str, Kind])

    def summary(self) -> dict[str, Any]:
        """The object that `qcompile --json` prints."""
        values = {name: getattr(self, name) for name in _SUMMARY}
        artifact = None if self.artifact is None else str(self.artifact)
        return values | {"artifact": artifact, "budget": list(self.budget)}

    def run(self, feeds: Feeds) -> Outputs:
        """Run the artifact on one batch (see `Artifact.run`)."""
        assert self.artifact is not None, "nothing was written"
        return load_artifact(self.artifact).run(feeds)


_NO_LIMIT = "64bits"


def compile(  # noqa: A001 - the name that users expect: qcompiler.compile
    model: Model | Path | str,
    target: str = "cpu",
    budget: str | Sequence[str] | None = None,
    calibration: Calibration | Path | str | Iterable[Any] | None = None,
    pipeline: Pipeline | Path | str | None = None,
    keep: str | Sequence[str] = (),
    output: Path | str | None = None,
    seed: int = 0,
    resume: bool = True,
    activations: str = "auto",
    explain: bool = False,
    progress: Progress | None = None,
    preprocess: str | None = None,
    tokenizer: Path | str | None = None,
    pareto: int = 0,
    effort: str = "default",
) -> CompileResult:
    """Compile a model under a budget into a verified artifact.

    Args:
        model: an ONNX file, or what `load` or `capture` returned; it is not changed.
        target: name of a backend: "cpu" or "onnx".
        budget: "3.5bits" (average stored bits per weight), "120MB", "8ms" (measured latency of a sample on this
            machine, target cpu), "1.2Gbops" (bit operations of a sample), or several that hold together.
        calibration: .npz or .npy, a folder of images, a text file, an iterable of feeds, a `Calibration`;
            without any, the compiler makes inputs and accuracy suffers.
        pipeline: name of a recipe, a TOML file or a `Pipeline`; by default the recipe that suits the model.
        keep: a pattern of sites that stay float, or several; "embeddings" means all of them.
        output: the folder to write; the model's name with ".qc" in the current folder by default.
        seed: of everything random.
        resume: keep measurements in $QCOMPILER_CACHE or ~/.cache/qcompiler, and go on from those that are there.
        activations: "auto" (what the target does best), "float", "static" or "dynamic".
        explain: stop after planning and write nothing.
        progress: what long work reports to; nothing by default.
        preprocess: how a folder of images becomes inputs (see `calibration.from_path`).
        tokenizer: tokenizer.json that turns a text file into inputs.
        pareto: solve for so many sizes (2 or more) and stop after planning, as with `explain`; the points are
            `result.plan.solution["pareto"]`. Without a budget, the plan is the one that loses least.
        effort: "low", "default" or "high": how much time a recipe may take for accuracy.

    Raises:
        QcompilerError: bad input, infeasible budget, unwritable output, failed verification; one line each.
    """
    start = time.monotonic()
    progress = progress or Silent()
    model = model if isinstance(model, Model) else _path_of(model)
    explain = explain or pareto > 0
    options = _options(target, _NO_LIMIT if pareto and not budget else budget, keep, seed, activations, effort)
    if pareto:
        options = replace(options, pareto=pareto, given=options.given | {"pareto"})
    backend: Backend = registry.find("backends", target)()
    if not explain:
        require_toolchain(backend)
    source = model if isinstance(model, Model) else load_onnx(model)
    check_suitable(source, backend)
    for name in source.ir.meta.get(DEFAULTS_KEY, ()):
        progress.note(f"input '{name}' has a default value and becomes a constant: the artifact does not take it")
    out = Path(output) if output is not None else Path(f"{source.name}.qc")
    if not explain:
        check_output(out)
    passes = build_pipeline(pipeline, source, options)
    check_order(passes, only_plan=explain)
    passes.foresee(source)
    options = replace(options, budget=budgets_of(passes))
    with open_cache(resume) as cache:
        origin = Source(calibration, preprocess, None if tokenizer is None else Path(tokenizer))
        samples = gather(origin, source, seed, progress)
        work = source.clone()
        work.calibration, work.cache = samples.used, cache
        lowering = lower(work, passes, progress, only_plan=explain)
        if explain:
            return _explained(lowering, options, samples, backend, passes, start)
        path = None if isinstance(model, Model) else model
        manifest = emit(lowering, out, options, passes, samples, path, start, progress)
    return _result(lowering, out, manifest)


def load(path: Path | str) -> Any:
    """Open an ONNX file as a `Model`, or a compiled folder as an `Artifact`.

    Raises:
        BadModel: it is neither, or broken.
    """
    path = _path_of(path)
    return load_artifact(path) if path.is_dir() else load_onnx(path)


def _path_of(model: Any) -> Path:
    """The file that a caller gave as a model, or BadOption that says how to make one of what was given."""
    if isinstance(model, str | os.PathLike):
        return Path(model)  # type: ignore[reportUnknownArgumentType]
    fix = "give the path of an ONNX file, or what qcompiler.load or qcompiler.capture returned"
    torch = sys.modules.get("torch")  # who holds a module has imported it
    if torch is not None and isinstance(model, torch.nn.Module):
        fix = "use qcompiler.capture(module, example_inputs)"
    raise BadOption(f"a {type(model).__name__} is not a model that can be compiled", "model", fix)


def _texts(values: Any, option: str, fix: str) -> tuple[str, ...]:
    """One text or several as a tuple."""
    given: Any = (values,) if isinstance(values, str) else () if values is None else values
    several: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)  # type: ignore[reportUnknownArgumentType]
    if not all(isinstance(one, str) for one in several):
        raise BadOption(f"{values!r} is not a text", option, fix)
    return several


def _options(target: Any, budget: Any, keep: Any, seed: Any, activations: str, effort: str) -> Options:
    number = budget if isinstance(budget, int | float) else 4
    budgets = _texts(budget, "--budget", f'write "{number:g}bits" for bits per weight, or "120MB" for a size')
    patterns = _texts(keep, "--keep", 'write "embeddings", or patterns of names such as "layers.0.*"')
    for text in budgets:
        parse_budget(text)
    known = registry.names("backends")
    if not isinstance(target, str) or target not in known:
        raise BadOption(f"unknown target '{target}'", "--target", f"choose one of {', '.join(sorted(known))}")
    if not isinstance(seed, int):
        raise BadOption(f"the seed {seed!r} is not a whole number", "--seed", "give 0 or more")
    if seed < 0:
        raise BadOption(f"the seed {seed} is negative", "--seed", "give 0 or more")
    given = {"target"} | ({"budget"} if budgets else set()) | ({"keep"} if patterns else set())
    given |= ({"seed"} if seed else set()) | ({"activations"} if activations != "auto" else set())
    given |= {"effort"} if effort != "default" else set()
    return Options(target, budgets, patterns, seed, activations, frozenset(given), effort=effort)


@contextmanager
def open_cache(resume: bool) -> Generator[Cache]:
    """The cache that outlives the run, or one that goes away with it."""
    if resume:
        folder = os.environ.get("QCOMPILER_CACHE") or Path.home() / ".cache" / "qcompiler"
        yield Cache(Path(folder))
        return
    with temporary_folder("cache") as folder:
        yield Cache(folder)


def _explained(
    lowering: Lowering, options: Options, samples: Samples, backend: Backend, passes: Pipeline, start: float
) -> CompileResult:
    model, solution = lowering.rounded, lowering.rounded.plan.solution
    batch = next(iter(samples.used.batches(samples.batch, samples.batch)))
    return CompileResult(
        None, options.target, options.budget, bits_per_weight(model), stored_bytes(model),
        stored_bytes(lowering.original, Plan()), solution.get("predicted_loss"), solution.get("lower_bound"),
        solution.get("gap"), None, {"sqnr_db": None, "kl": None, "top1_agreement": None}, False,
        time.monotonic() - start, expected_peak(model, batch, backend, passes.passes), model.plan, lowering.reports,
        uncounted=uncounted_weights(lowering.original.ir),
    )  # fmt: skip


def _result(lowering: Lowering, out: Path, manifest: dict[str, Any]) -> CompileResult:
    names = (
        "target", "bits_per_weight", "stored_bytes", "fp32_bytes", "predicted_loss", "lower_bound", "gap",
        "realised_loss", "fidelity", "output_kinds", "seconds", "peak_rss_bytes",
    )  # fmt: skip
    values = {name: manifest[name] for name in names}
    plan, budget = lowering.rounded.plan, tuple(manifest["budget"])
    return CompileResult(
        artifact=out, budget=budget, verified=True, plan=plan, reports=lowering.reports,
        held_back=manifest["calibration"]["held_back"], uncounted=uncounted_weights(lowering.original.ir), **values,
    )  # fmt: skip
