"""Target "cpu": the whole model as one library made by TVM, with packed weights and our own kernels."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.errors import BadModel, MissingExtra
from qcompiler.formats import Int, PerChannel, PerGroup, PerTensor, QuantSpec, UInt
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress
from qcompiler.target import Compiled, Runnable, Tolerance

LIBRARY, WEIGHTS, FACTS, RUNTIME = "model.so", "model.npz", "model.json", "runtime.py"
TOLERANCE = Tolerance(1e-3, "order of float32 sums; a rounding of an activation may flip by one step")
WIDTHS = range(2, 9)


@dataclass(frozen=True)
class CpuBackend:
    """Compile for this machine's CPU through TVM.

    Attributes:
        cpu: LLVM name of the CPU to compile for; empty: this machine's.
    """

    name: str = "cpu"
    cpu: str = ""

    def candidates(self, site: Site, bits: Sequence[int]) -> list[SitePlan]:
        """Products: grouped weights, int8 rows at run time; convolutions: weights per channel, static uint8."""
        plans: list[SitePlan] = []
        for width in sorted(set(bits) & set(WIDTHS), reverse=True):
            if site.op in ("Conv", "ConvTranspose"):
                specs, activation = [QuantSpec(Int(width), PerChannel(), True)], "static"
            elif width == 8:
                specs, activation = [QuantSpec(Int(8), PerChannel(), True)], "dynamic"
            else:
                specs = [QuantSpec(UInt(width), PerGroup(size), False) for size in (32, 64, 128)]
                activation = "dynamic"
            activation = "float" if site.op == "Gather" else activation
            plans += [SitePlan(spec, activation) for spec in specs]
        return [plan for plan in plans if self.supports(site, plan) is None]

    def supports(self, site: Site, plan: SitePlan) -> str | None:
        """Why no kernel takes this plan, or None."""
        if plan.weight is None:
            return None
        fmt, granularity = plan.weight.format, plan.weight.granularity
        if not isinstance(fmt, Int | UInt) or fmt.bits not in WIDTHS:
            return f"kernels exist for integers of 2 to 8 bits, not for {fmt}"
        if not isinstance(granularity, PerTensor | PerChannel | PerGroup):
            return f"no kernel has scales per {granularity}"
        if site.op == "ConvTranspose":
            return "transposed convolutions have no packed kernel"
        if site.op == "Conv" and len(site.shape) not in (3, 4):
            return f"convolutions over {len(site.shape) - 2} dimensions have no packed kernel"
        if site.op in ("MatMul", "Gemm") and len(site.shape) != 2:
            return "a batch of weight matrices has no packed kernel"
        return None

    def compile(self, model: Model, folder: Path, progress: Progress) -> Compiled:
        """Write library, packed weights, a loader and the facts it needs."""
        _require_tvm()
        from qcompiler.backends.tvm.build import build_library, features_of, has_vnni, host_target
        from qcompiler.backends.tvm.importer import import_model
        from qcompiler.backends.tvm.kernels import KernelSet
        from qcompiler.backends.tvm.rewrite import Rewrite

        target = host_target(self.cpu or None)
        kernels = KernelSet("vnni" if has_vnni(target) else "portable")
        signature = _signature(model.ir)
        rewrite = Rewrite(model.ir.clone(), kernels)
        rewrite.run()
        module = _imported(import_model, rewrite.model, kernels, model.name)
        progress.note(f"cpu: {sum(rewrite.counts.values())} packed operations, {len(kernels)} kernels ({kernels.dot})")
        build_library(module, kernels, target, folder / LIBRARY, progress)
        rewrite.parameters.save(folder / WEIGHTS)
        facts = {
            **signature, "parameters": list(rewrite.parameters.arrays), "features": features_of(target),
            "target": str(target), "packed": rewrite.counts, "kernels": len(kernels), "dot": kernels.dot,
        }  # fmt: skip
        (folder / FACTS).write_text(json.dumps(facts, indent=1), "utf-8")
        shutil.copyfile(Path(__file__).with_name("runtime.py"), folder / RUNTIME)
        return Compiled((LIBRARY, WEIGHTS, FACTS, RUNTIME), TOLERANCE, {k: facts[k] for k in ("packed", "kernels", "dot", "target")})

    def load(self, folder: Path) -> Runnable:
        """Load an artifact with the same loader that lies in its folder."""
        _require_tvm()
        from qcompiler.backends.tvm.runtime import load

        return load(folder)


def _require_tvm() -> None:
    if importlib.util.find_spec("tvm") is None:
        raise MissingExtra("tvm", "target cpu")


def _signature(model: ir.Model) -> dict[str, Any]:
    """Inputs and outputs as the loader needs them."""
    inputs: list[dict[str, Any]] = []
    for value in model.graph.inputs:
        if value.shape is None or value.dtype is None:
            raise BadModel("an input without type or rank", where=str(value.name))
        shape = [d if isinstance(d, int) else str(d.value) for d in value.shape.dims]
        inputs.append({"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape})
    return {"inputs": inputs, "outputs": [value.name for value in model.graph.outputs]}


def _imported(import_model: Any, model: ir.Model, kernels: Any, name: str) -> Any:
    """The Relax module; what TVM cannot import is the model's fault, in one line."""
    try:
        return import_model(ir.to_proto(model), kernels)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadModel(f"TVM cannot import the model ({reason})", name, "use --target onnx") from error
