"""Who may import whom: the rule of docs/architecture.md, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Within qcompiler: a part may import its own layer and the layers below it.
LAYERS = [
    {"errors", "__init__"},
    {"registry", "progress", "scratch", "folders"},
    {"formats"},
    {"plan"},
    {"model", "graph", "capture", "preprocess", "target", "budget", "overrun", "variants"},
    {"measure", "calibration"},
    {"evaluate"},
    {"pipeline", "options", "contracts"},
    {"report", "artifact", "build", "diagnose", "bench", "commands", "api", "cli"},
]
# Imported by fx_twin when a twin is built, and by the pass that tunes one.
TORCH_FILES = (
    "torch_ops.py",
    "torch_nn_ops.py",
    "learning_twin.py",
    "transformed_twin.py",
    "rounded_weight.py",
    "learned_scales.py",
    "learned_turns.py",
    "cayley.py",
    "tuned_twin.py",
    "learned_weights.py",
    "recomputed.py",
    "distance.py",
    "training_state.py",
    "learned_codes.py",
    "descent.py",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path, *, at_run_time: bool = True) -> set[str]:
    """Dotted names of all `qcompiler...` modules imported anywhere in a file, TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text("utf-8"))
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "qcompiler"}


def files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "passes" not in p.relative_to(ROOT).parts[1:2])


def part(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("folder", ["solvers", "passes", "backends"])
def test_outer_packages_import_only_what_they_may(folder: str) -> None:
    allowed = {
        "solvers": {"solvers"},
        "passes": set(RANK) | {"passes", "solvers"},
        "backends": set(RANK) | {"backends"},
    }[folder]
    wrong = [(str(p), n) for p in files(folder) for n in imports(p) if part(n) not in allowed and n != "qcompiler"]
    assert not wrong


def test_qcompiler_imports_nothing_outside_itself_and_only_downward() -> None:
    wrong: list[str] = []
    for path in sorted((ROOT / "qcompiler").rglob("*.py")):
        relative = path.relative_to(ROOT / "qcompiler")
        if relative.parts[0] in ("passes", "backends", "solvers"):
            continue
        own = relative.parts[0].removesuffix(".py")
        assert own in RANK, f"{path} has no layer in this test"
        for name in imports(path):
            target = part(name)
            if own == "__init__":
                continue
            if target in ("passes", "backends", "solvers"):
                wrong.append(f"{relative} imports {name}")
            elif target in RANK and RANK[target] > RANK[own]:
                wrong.append(f"{relative} (layer {RANK[own]}) imports {name} (layer {RANK[target]})")
    assert not wrong


def test_registry_names_exist() -> None:
    from qcompiler import registry

    for kind in ("passes", "formats", "solvers", "backends"):
        for name in registry.names(kind):
            assert registry.find(kind, name)


def test_the_core_does_not_import_optional_packages_at_the_top() -> None:
    """torch and tvm are imported inside functions, or in backends/tvm behind the registry."""
    for path in [*files("qcompiler"), *files("passes"), *files("solvers"), *files("backends")]:
        if "tvm" in path.parts or path.name in TORCH_FILES:
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {node.module.split(".")[0]}
            else:
                continue
            assert not names & {"torch", "tvm"}, path
