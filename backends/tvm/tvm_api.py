"""TVM's builders without TVM's annotations, which forbid what the functions accept (Python integers, tuples)."""

from __future__ import annotations

from typing import Any

import tvm.ir
import tvm.relax
import tvm.relax.frontend.onnx.onnx_frontend
import tvm.s_tir
import tvm.script.ir_builder
import tvm.script.tirx
import tvm.sym
import tvm.tirx
import tvm.tirx.script.builder

T: Any = tvm.script.tirx  # operations
B: Any = tvm.tirx.script.builder  # statements
IRBuilder: Any = tvm.script.ir_builder.IRBuilder
tirx: Any = tvm.tirx
s_tir: Any = tvm.s_tir
relax: Any = tvm.relax
ir: Any = tvm.ir
onnx_frontend: Any = tvm.relax.frontend.onnx.onnx_frontend
sym: Any = tvm.sym
Var: Any = tvm.tirx.Var
PrimFunc = Any  # the annotation of a generated kernel
