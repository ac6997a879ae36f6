"""Where passes, formats, solvers and backends are found by name.

Each registry is a literal dict from name to "module:attribute", imported when used: nothing is registered
by importing a module, and no import runs upward. Third parties add theirs through the entry-point groups
`qcompiler.passes`, `qcompiler.formats`, `qcompiler.solvers`, `qcompiler.variants` and `qcompiler.backends`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qcompiler.errors import BadOption

PASSES: dict[str, str] = {
    "equalize-activations": "qcompiler.passes.transform.equalize_activations:EqualizeActivations",
    "mobilequant": "qcompiler.passes.transform.mobilequant:MobileQuant",
    "center-norms": "qcompiler.passes.transform.center_norms:CenterNorms",
    "rotate": "qcompiler.passes.transform.rotate:Rotate",
    "spinquant": "qcompiler.passes.transform.spinquant:SpinQuant",
    "smooth": "qcompiler.passes.transform.smooth:Smooth",
    "smooth-plus": "qcompiler.passes.transform.smooth_plus:SmoothPlus",
    "smooth-attention": "qcompiler.passes.transform.smooth_attention:SmoothAttention",
    "awq": "qcompiler.passes.transform.awq:AWQ",
    "dual-scale": "qcompiler.passes.transform.dual_scale:DualScale",
    "scale-fold": "qcompiler.passes.transform.scale_fold:ScaleFold",
    "equalize": "qcompiler.passes.transform.equalize:Equalize",
    "absorb-bias": "qcompiler.passes.transform.absorb_bias:AbsorbBias",
    "lorc": "qcompiler.passes.transform.lorc:LoRC",
    "svdquant": "qcompiler.passes.transform.svdquant:SVDQuant",
    "channel-order": "qcompiler.passes.transform.channel_order:ChannelOrder",
    "pca-split": "qcompiler.passes.transform.pca_split:PCASplit",
    "split-panels": "qcompiler.passes.transform.split_panels:SplitPanels",
    "join-panels": "qcompiler.passes.transform.join_panels:JoinPanels",
    "allocate": "qcompiler.passes.plan.allocate:Allocate",
    "uniform": "qcompiler.passes.plan.uniform:Uniform",
    "adadim": "qcompiler.passes.plan.adadim:AdaDim",
    "nearest": "qcompiler.passes.round.nearest:Nearest",
    "gptq": "qcompiler.passes.round.gptq:GPTQ",
    "decoupleq": "qcompiler.passes.round.decoupleq:DecoupleQ",
    "adaround": "qcompiler.passes.round.adaround:AdaRound",
    "adaquant": "qcompiler.passes.round.adaquant:AdaQuant",
    "autoround": "qcompiler.passes.round.autoround:AutoRound",
    "bias-correction": "qcompiler.passes.round.bias_correction:BiasCorrection",
    "activation-ranges": "qcompiler.passes.round.activation_ranges:ActivationRanges",
    "tune": "qcompiler.passes.round.tune:Tune",
    "choose-transforms": "qcompiler.passes.search.choose_transforms:ChooseTransforms",
    "choose-rounding": "qcompiler.passes.search.choose_rounding:ChooseRounding",
    "insert-qdq": "qcompiler.passes.lower.insert_qdq:InsertQDQ",
}
FORMATS: dict[str, str] = {
    "int": "qcompiler.formats.integer:Int",
    "uint": "qcompiler.formats.integer:UInt",
    "qoq": "qcompiler.formats.progressive:Progressive",  # as qoq4
    "int#to#p": "qcompiler.formats.promoted:Promoted",  # as int4to8p10
}
SOLVERS: dict[str, str] = {
    "lagrangian": "qcompiler.solvers.knapsack:solve_lagrangian",
    "ilp": "qcompiler.solvers.ilp:solve_ilp",
    "quadratic": "qcompiler.solvers.quadratic:solve_quadratic",
    "metropolis": "qcompiler.solvers.metropolis:solve_metropolis",
    "soft-mixture": "qcompiler.solvers.soft_mixture:solve_soft_mixture",
    "policy-search": "qcompiler.solvers.policy_search:solve_policy_search",
}
VARIANTS: dict[str, str] = {  # transforms that allocation may put on or off, site by site
    "scaled": "qcompiler.passes.transform.scaled:Scaled",
    "lowrank": "qcompiler.passes.transform.lowrank:LowRank",
}
BACKENDS: dict[str, str] = {
    "onnx": "qcompiler.backends.onnx.backend:OnnxBackend",
    "cpu": "qcompiler.backends.tvm.backend:CpuBackend",
}

_BUILT_IN = {"passes": PASSES, "formats": FORMATS, "solvers": SOLVERS, "variants": VARIANTS, "backends": BACKENDS}


@cache
def names(kind: str) -> dict[str, str]:
    """All names of one kind ("passes", "formats", "solvers", "variants", "backends") with their "module:attribute"."""
    found = dict(_BUILT_IN[kind])
    for entry in entry_points(group=f"qcompiler.{kind}"):
        found.setdefault(entry.name, entry.value)
    return found


def find(kind: str, name: str) -> Any:
    """Import and return what `name` stands for; BadOption lists the known names if there is none."""
    known = names(kind)
    if name not in known:
        raise BadOption(f"unknown name '{name}'", where=kind, fix=f"choose one of {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
