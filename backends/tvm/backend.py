"""Target "cpu": the whole model as one library made by TVM, with packed weights and our own kernels."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompiler.backends.tvm.conv_sites import FIXED_PADS
from qcompiler.backends.tvm.layout import LONGEST_GROUP
from qcompiler.errors import BackendUnavailable, BadModel, MissingExtra, PassRefused
from qcompiler.formats import Int, PerChannel, PerGroup, PerRowGroup, QuantSpec, UInt
from qcompiler.graph.functions import rounds_rows
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.latency import Clock
from qcompiler.model import Model
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress
from qcompiler.target import Compiled, Runnable, Tolerance

LIBRARY, WEIGHTS, FACTS, RUNTIME = "model.so", "model.npz", "model.json", "runtime.py"
EXACT = Tolerance(1e-3, "order of float32 sums")
ROUNDED = Tolerance(1e-3, "order of float32 sums, which flips some roundings of 8-bit activations", noise=4e-6)
WIDTHS = range(2, 9)
_CONV_GROUP = 32  # columns (input channels x kernel) that share a scale


@dataclass(frozen=True)
class CpuBackend:
    """Compile for this machine's CPU through TVM.

    Attributes:
        cpu: LLVM name of the CPU to compile for; empty: this machine's.
    """

    program_bytes: ClassVar[int] = 850_000_000  # TVM, with the torch that it imports, 400 MB here and 450 MB there
    name: str = "cpu"
    cpu: str = ""

    def require(self) -> None:
        """Raise MissingExtra where TVM is not installed."""
        if not _is_installed():
            raise MissingExtra("tvm", "target cpu")

    def check(self, model: Model) -> None:
        """Raise BadModel for weights that are not float32, or an operator that neither TVM nor we have.

        Without TVM nobody knows about the operators.
        """
        _check_types(model)
        if _is_installed():
            from qcompiler.backends.tvm.operators import check_operators

            check_operators(model.ir, model.name)

    def candidates(self, site: Site, bits: Sequence[int]) -> list[SitePlan]:
        """Products: grouped weights, int8 rows at run time; convolutions: static uint8, rows or groups."""
        plans: list[SitePlan] = []
        for width in sorted(set(bits) & set(WIDTHS), reverse=True):
            if site.op in ("Conv", "ConvTranspose"):
                specs, activation = _conv_specs(site, width), "static"
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
        if plan.activation == "dynamic" and site.op not in ("MatMul", "Gemm"):
            return f"dynamic activations are for MatMul and Gemm, not {site.op}"
        if plan.weight is None:
            return None
        fmt, granularity = plan.weight.format, plan.weight.granularity
        if not isinstance(fmt, Int | UInt) or fmt.bits not in WIDTHS:
            return f"kernels exist for integers of 2 to 8 bits, not for {fmt}"
        if isinstance(granularity, PerRowGroup):
            return "kernels sum up codes before they are scaled: scales may not differ within a row's group of columns"
        if isinstance(granularity, PerGroup) and granularity.size > LONGEST_GROUP:
            return f"groups longer than {LONGEST_GROUP} may overflow an int32 sum"
        return _conv_refusal(site) if site.op in ("Conv", "ConvTranspose") else _product_refusal(site)

    def compile(self, model: Model, folder: Path, progress: Progress) -> Compiled:
        """Write library, packed weights, a loader and the facts it needs.

        Raises:
            MissingExtra: TVM is not installed.
            PassRefused: the model is not lowered.
            BadModel: an operation that neither TVM nor we have, or a packed weight without a kernel.
        """
        self.require()
        if not model.lowered:
            raise PassRefused("the model is not lowered", where=model.name, fix="run InsertQDQ before the backend")
        from qcompiler.backends.tvm.build import build_library, features_of, has_vnni, host_target
        from qcompiler.backends.tvm.dimensions import name_dimensions
        from qcompiler.backends.tvm.importer import import_model
        from qcompiler.backends.tvm.kernels import KernelSet
        from qcompiler.backends.tvm.rewrite import Rewrite

        target = host_target(self.cpu or None)
        kernels = KernelSet("vnni" if has_vnni(target) else "portable")
        signature = _signature(model.ir)
        work = model.ir.clone()
        name_dimensions(work, model.calibration)
        rewrite = Rewrite(work, kernels)
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
        shown = {key: facts[key] for key in ("packed", "kernels", "dot", "target")}
        tolerance = ROUNDED if _rounds_activations(model.ir) else EXACT
        return Compiled((LIBRARY, WEIGHTS, FACTS, RUNTIME), tolerance, shown)

    def clock(self) -> Clock:
        """Times this target's kernels on this machine.

        Raises:
            MissingExtra: TVM is not installed.
            BackendUnavailable: the target is another CPU than this machine's.
        """
        self.require()
        from qcompiler.backends.tvm.build import has_vnni, host_target
        from qcompiler.backends.tvm.timing import CpuClock

        target = host_target()
        if self.cpu and str(host_target(self.cpu)) != str(target):
            raise BackendUnavailable(f"no time can be measured for {self.cpu} here", "target cpu", "compile there")
        return CpuClock(target, "vnni" if has_vnni(target) else "portable")

    def load(self, folder: Path) -> Runnable:
        """Load an artifact with the same loader that lies in its folder."""
        self.require()
        from qcompiler.backends.tvm.runtime import load

        return load(folder)


def _is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("tvm", "tvm_ffi"))


def _check_types(model: Model) -> None:
    """Our kernels, and what TVM puts between them, compute in float32."""
    for site in find_sites(model.ir):
        tensor = site.weight.const_value
        assert tensor is not None  # of a site
        if tensor.dtype != ir.DataType.FLOAT:
            found = f"{tensor.dtype.numpy()} in weight '{site.weight.name}'"
            what = f"target cpu runs float32 models only; found {found}"
            fix = "convert it to float32" if tensor.dtype == ir.DataType.BFLOAT16 else "use --target onnx"
            raise BadModel(what, model.name, fix)


def _conv_specs(site: Site, width: int) -> list[QuantSpec]:
    """One scale a row, with zero points below 8 bits; groups of columns where codes are few and rows long."""
    if width == 8:
        return [QuantSpec(Int(8), PerChannel(), True)]
    specs = [QuantSpec(UInt(width), PerChannel(), False)]
    if width <= 4 and site.groups == 1 and site.columns >= 2 * _CONV_GROUP:
        specs.append(QuantSpec(UInt(width), PerGroup(_CONV_GROUP), False))
    return specs


def _conv_refusal(site: Site) -> str | None:
    if site.op == "ConvTranspose":
        return "transposed convolutions have no packed kernel"
    if len(site.shape) not in (3, 4):
        return f"convolutions over {len(site.shape) - 2} dimensions have no packed kernel"
    if any(node.attributes.get_string("auto_pad", "NOTSET") not in FIXED_PADS for node in site.users):
        return "padding that depends on the size of the input (auto_pad) has no packed kernel"
    return None


def _product_refusal(site: Site) -> str | None:
    if len(site.shape) != 2:
        return "a batch of weight matrices has no packed kernel"
    if any(node.op_type == "Gemm" and node.attributes.get_int("transA", 0) for node in site.users):
        return "Gemm with transA has no packed kernel"
    return None


def _rounds_activations(model: ir.Model) -> bool:
    return any(node.op_type == "QuantizeLinear" or rounds_rows(node) for node in model.graph)


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
