"""Relax module and kernels -> one shared library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompiler.backends.tvm.kernels import KernelSet
from qcompiler.progress import Progress

_FLAGS = {  # LLVM's name -> the kernel's, of the instruction sets that matter
    "avx2": "avx2", "fma": "fma", "avx512f": "avx512f", "avx512vl": "avx512vl", "avx512bw": "avx512bw",
    "avx512vnni": "avx512_vnni", "avx512fp16": "avx512_fp16", "avxvnni": "avx_vnni",
}  # fmt: skip


def host_target(cpu: str | None = None) -> Any:
    """The LLVM target of this machine, or of a named CPU ("x86-64-v3", "sapphirerapids")."""
    import tvm
    from tvm.target import codegen

    return tvm.target.Target({"kind": "llvm", "mcpu": cpu or codegen.llvm_get_system_cpu()})


def has_vnni(target: Any) -> bool:
    """Whether the target's CPU has 512-bit `vpdpbusd`."""
    from tvm.target import codegen

    return bool(codegen.llvm_cpu_has_features(["avx512vnni"], target))


def build_library(module: Any, kernels: KernelSet, target: Any, path: Path, progress: Progress) -> None:
    """Compile everything into one shared library at `path`."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as cpu_generic

    from qcompiler.backends.tvm.schedule import schedule_pass
    from qcompiler.backends.tvm.tvm_api import relax

    passes = [
        *cpu_generic.library_dispatch_passes(target),
        *cpu_generic.legalize_passes(target),
        *cpu_generic.dataflow_lower_passes(target),
        *cpu_generic.finalize_passes(target),
        schedule_pass(),
    ]
    with target:
        executable = relax.build(module, target=target, relax_pipeline=tvm.transform.Sequential(passes))
    compiled = kernels.compile(target, progress)
    if compiled is not None:
        executable.mod.import_module(compiled)
    executable.export_library(str(path))


def features_of(target: Any) -> list[str]:
    """Names of /proc/cpuinfo for the instruction sets that the library may use."""
    from tvm.target import codegen

    return [flag for feature, flag in _FLAGS.items() if codegen.llvm_cpu_has_features([feature], target)]
