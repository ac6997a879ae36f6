"""Which passes run: a recipe (passes/recipes/*.toml) by name, a TOML file, or a Pipeline, with the user's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from qcompiler.budget import is_embedding
from qcompiler.errors import BadOption
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.pipeline import EFFORTS, Pass, Pipeline

ACTIVATIONS = ("auto", "float", "static", "dynamic")
AUTO = "auto"
_LOGITS_RANK = 3  # samples, positions, vocabulary
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Options:
    """What the user says about a compilation; handed to every pass that has an option of the same name.

    Attributes:
        target: name of a backend.
        budget: amounts such as "3.5bits" or "120MB", which hold together.
        keep: patterns of sites that stay float.
        seed: of everything random.
        activations: "auto" (what the target does best), "float", "static" or "dynamic".
        pareto: points of the size-against-loss path to solve for; 0: none.
        effort: one of `pipeline.EFFORTS`: which passes of a recipe or file are run.
    """

    target: str
    budget: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    seed: int = 0
    activations: str = "auto"
    given: frozenset[str] = field(default_factory=frozenset[str])
    pareto: int = 0
    effort: str = "default"

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise BadOption(f"unknown effort '{self.effort}'", "--effort", f"choose one of {', '.join(EFFORTS)}")
        if self.activations not in ACTIVATIONS:
            fix = f"choose one of {', '.join(ACTIVATIONS)}"
            raise BadOption(f"unknown mode '{self.activations}'", "--activations", fix)


def recipes() -> list[str]:
    """Names of the recipes that come with qcompiler."""
    folder = resources.files("qcompiler.passes") / "recipes"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def build_pipeline(choice: str | Path | Pipeline | None, model: Model, options: Options) -> Pipeline:
    """The pipeline to run, its passes filled with the options.

    Args:
        choice: name of a recipe, path of a TOML file, a Pipeline; "auto" or None: the recipe that suits the model.
        model: the model to be compiled.
        options: an option of the user wins over what a TOML file says about it.

    Raises:
        BadOption: no such recipe, or an option that no pass of the pipeline takes.
    """
    if choice is None or str(choice) == AUTO:
        choice = default_recipe(model)
    if isinstance(choice, Pipeline):
        if "effort" in options.given:
            raise BadOption("a Pipeline says itself what is run", "--effort", "drop it, or give a recipe's name")
        return fill(choice, options)
    pipeline = _load(str(choice), options.effort, "effort" in options.given)
    return fill(pipeline, options)


def default_recipe(model: Model) -> str:
    """The recipe that suits a model.

    "convolutional" where convolutions hold most weights or most of the layers; "decoder" where an output has a number
    for each row of a table that is looked up (logits over a vocabulary); else "encoder".
    """
    sites = find_sites(model.ir)
    conv = [s for s in sites if s.op in _CONVOLUTIONS]
    heavy = 2 * sum(s.count for s in conv) > sum(s.count for s in sites)
    if heavy or 2 * len(conv) > len(sites):
        return "convolutional"
    vocabularies = {s.shape[0] for s in sites if is_embedding(s)}
    scores = {v.shape[-1] for v in model.graph.outputs if v.shape is not None and len(v.shape) == _LOGITS_RANK}
    return "decoder" if vocabularies & scores else "encoder"


def fill(pipeline: Pipeline, options: Options) -> Pipeline:
    """Set `target`, `budget`, `keep`, `seed`, `activations` and `pareto` of every pass that has them."""
    taken: set[str] = set()
    passes: list[Pass] = []
    for item in pipeline.passes:
        known = {f.name: f for f in fields(item)}
        values = {
            name: _as_field(known[name], getattr(options, name))
            for name in ("target", "budget", "keep", "seed", "activations", "pareto")
            if name in known and (name in options.given or getattr(item, name) == known[name].default)
        }
        values = {name: value for name, value in values.items() if value or name in options.given}
        taken |= (set(known) - set(item.hints)) & options.given
        with pipeline.named(item):
            passes.append(replace(item, **values))
    left = sorted(options.given - taken - {"target", "seed", "effort"})
    if left:
        raise BadOption(
            "no pass of this pipeline takes it", f"--{left[0]}", "drop it, or put 'allocate' in the pipeline"
        )
    return replace(pipeline, passes=passes)


def check_order(pipeline: Pipeline, *, only_plan: bool = False) -> None:
    """Raise BadOption for a pipeline that cannot end in a lowered model, before any of it runs.

    Args:
        pipeline: the passes.
        only_plan: it is stopped at the plan, so that it need not lower.
    """
    lowering = ""
    for item in pipeline.passes:
        if lowering and item.stage != "lowered":
            what = f"the pass '{item.registered_name()}' comes behind '{lowering}', which leaves it nothing to do"
            raise BadOption(what, "--pipeline", f"put '{lowering}' behind it")
        lowering = lowering or (item.registered_name() if item.stage == "lowering" else "")
    if not lowering and not only_plan:
        raise BadOption("the pipeline does not lower the model", "--pipeline", "end it with the pass 'insert-qdq'")


def budgets_of(pipeline: Pipeline) -> tuple[str, ...]:
    """The budgets that the passes of a filled pipeline keep to: the user's, the file's or the default."""
    found: dict[str, None] = {}
    for item in pipeline.passes:
        value = getattr(item, "budget", ())
        found |= dict.fromkeys((value,) if isinstance(value, str) else value)
    return tuple(found)


def _as_field(f: Field[Any], value: Any) -> Any:
    """A tuple for a field of tuples; the only entry for a field that holds one."""
    if isinstance(value, tuple) and not isinstance(f.default, tuple):
        values: Sequence[Any] = value  # type: ignore[reportUnknownVariableType]
        if len(values) > 1:
            raise BadOption("this pipeline takes only one", f"--{f.name}", "give it once")
        return values[0] if values else None
    return value


def _load(choice: str, effort: str, asked: bool) -> Pipeline:
    if choice in recipes():
        text = (resources.files("qcompiler.passes") / "recipes" / f"{choice}.toml").read_text("utf-8")
        return Pipeline.from_toml(text, f"recipe {choice}", effort, asked=asked)
    if not Path(choice).exists():
        names = ", ".join((AUTO, *recipes()))
        raise BadOption(
            f"there is no recipe and no file '{choice}'", "--pipeline", f"give a TOML file or one of {names}"
        )
    return Pipeline.load(Path(choice), effort, asked=asked)
