"""The ONNX Runtime target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnxruntime as ort

from qcompiler.backends.onnx.fast_form import FastForm, fast_form
from qcompiler.backends.onnx.session import OrtRunnable, optimized_operations, session_options, unfused
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import Granularity, Int, PerChannel, PerGroup, Progressive, Promoted, QuantSpec, UInt
from qcompiler.graph.codes import row_groups_refusal
from qcompiler.graph.sites import Site
from qcompiler.graph.storage import embed
from qcompiler.measure.memory import give_back
from qcompiler.model import Model
from qcompiler.plan import ActivationMode, SitePlan
from qcompiler.progress import Progress
from qcompiler.target import Compiled, Tolerance

FILE = "model.ort.onnx"
DATA = "model.ort.onnx.data"
_LARGE = 1 << 26  # bytes of weights from which they get a file of their own, which is mapped, not read
_GROUPS = (32, 128)


@dataclass(frozen=True)
class OnnxBackend:
    """ONNX Runtime on the CPU, with the kernels that the installed version was seen to run.

    Attributes:
        activations: what plans ask for: "float", "static" (uint8 per tensor: integer convolutions) or
            "dynamic" (int8 at run time: MatMulNBits with accuracy level 4).
        threads: of a loaded artifact; 0 lets ONNX Runtime choose.
    """

    program_bytes: ClassVar[int] = 120_000_000  # ONNX Runtime in the fresh process; the compiler has it anyway
    activations: str = "float"
    threads: int = 0
    name: str = field(default="onnx", init=False)

    def __post_init__(self) -> None:
        if self.activations not in ("float", "static", "dynamic"):
            raise BadOption(f"unknown activation mode '{self.activations}'", fix="use float, static or dynamic")

    def candidates(self, site: Site, bits: Sequence[int]) -> list[SitePlan]:
        """At most two plans a width: one scale a row, or groups of columns with zero points."""
        return [plan for width in bits for plan in self._plans(site, width)]

    def supports(self, site: Site, plan: SitePlan) -> str | None:
        """Everything from 2 to 8 bits runs, if need be decoded to float; dynamic activations only in products."""
        if plan.activation == "dynamic" and site.op not in ("MatMul", "Gemm"):
            return f"dynamic activations are for MatMul and Gemm, not {site.op}"
        if plan.activation == "dynamic" and site.weight.dtype not in (None, ir.DataType.FLOAT):
            return f"dynamic activations are for float32 models, not {site.weight.dtype}"
        if plan.weight is None:
            return None
        fmt = plan.weight.format
        if not isinstance(fmt, Int | UInt | Progressive | Promoted):
            return f"ONNX has no form for {fmt}"
        width = fmt.high if isinstance(fmt, Promoted) else fmt.bits
        if width > 8:
            return f"{width} bits are more than this target stores"
        return row_groups_refusal(site, plan.weight.granularity)

    def compile(self, model: Model, folder: Path, progress: Progress) -> Compiled:
        """Write `model.ort.onnx`, with its weights in a file of their own if they are large.

        Raises:
            PassRefused: if the model is not lowered.
        """
        if not model.lowered:
            raise PassRefused("the model is not lowered", where=model.name, fix="run InsertQDQ before the backend")
        form = fast_form(model.ir)
        files = save(form.model, folder)
        form.model = model.ir  # the file has it; a session of a large model wants the room
        give_back(model.graph.initializers.values())
        counts = optimized_operations(folder / FILE)
        missing = unfused(counts, form.expected)
        for operation, numbers in missing.items():
            progress.note(f"{operation}: {numbers['found']} of {numbers['expected']} were fused by ONNX Runtime")
        facts = {
            "onnxruntime": ort.__version__,
            "forms": form.forms,
            "expected": dict(form.expected),
            "operations": dict(counts.most_common()),
            "unfused": missing,
        }
        return Compiled(files, tolerance(form), facts)

    def load(self, folder: Path) -> OrtRunnable:
        """A session on `model.ort.onnx`."""
        return OrtRunnable.open(folder / FILE, session_options(self.threads))

    def _plans(self, site: Site, width: int) -> list[SitePlan]:
        product, conv = site.op in ("MatMul", "Gemm"), site.op == "Conv"
        row = QuantSpec(Int(width), PerChannel())
        if self.activations == "static" and (product or conv):
            # Integer kernels need one symmetric scale a row; narrower codes are widened to int8 for them.
            return [SitePlan(row, "static")]
        mode: ActivationMode = "dynamic" if self.activations == "dynamic" and product else "float"
        grouped: list[Granularity] = [PerGroup(g) for g in _GROUPS if g < site.columns]
        if width == 8:
            return [SitePlan(s, mode) for s in (row, *(QuantSpec(UInt(8), g, False) for g in grouped[:1]))]
        forms = [PerChannel(), *grouped[:1]] if site.layout.startswith("conv") else grouped or [PerChannel()]
        return [SitePlan(QuantSpec(UInt(width), form, False), mode) for form in forms]


def fastest_form(model: ir.Model, folder: Path) -> Path:
    """Write the fastest form that ONNX Runtime has of a lowered graph (for benchmarks); returns the file."""
    save(fast_form(model).model, folder)
    return folder / FILE


def save(model: ir.Model, folder: Path) -> list[str]:
    """Write a model as `model.ort.onnx`; returns the names of the files."""
    held = (v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = DATA if sum(held) >= _LARGE else None
    if external is None:
        embed(model)  # what stays float may still lie in the file that was captured
    ir.save(model, folder / FILE, external_data=external)
    return [FILE] if external is None else [FILE, DATA]


def tolerance(form: FastForm) -> Tolerance:
    """How far the fast form may be from the QDQ graph.

    Noise: MatMulNBits rounds activations with a scale a block where the QDQ graph has one a row, so a number may be
    off by half a step of either; integer kernels round their bias to the accumulator's scale.
    """
    if any("-int8" in kind for kind in form.forms.values()):
        reason = "MatMulNBits rounds activations to int8 block by block, the QDQ graph row by row"
        return Tolerance(1e-3, reason, noise=1 / 127)
    if form.rounds_activations:
        reason = "the order of float32 sums and the rounding of biases flip some roundings of activations"
        return Tolerance(1e-3, reason, noise=2e-5)
    return Tolerance(1e-3, "order of float32 sums")
