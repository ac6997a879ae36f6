"""Which rule carries labels across which operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from qcompiler.graph.folds.region import Region
from qcompiler.graph.folds.rules_attention import attention, rotary
from qcompiler.graph.folds.rules_elementwise import (
    HOMOGENEOUS,
    SAME,
    SUMS,
    clip,
    pointwise,
    product,
    reciprocal,
    sums,
    unary,
)
from qcompiler.graph.folds.rules_linear import conv, gemm, matmul, norm
from qcompiler.graph.folds.rules_shape import (
    concat,
    expand,
    gather,
    reduction,
    reshaping,
    slicing,
    spatial,
    split,
    transpose,
)


def _nothing(_region: Region, _node: ir.Node) -> None:
    """The operation looks at shapes only."""


_NORMS = (
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "InstanceNormalization",
    "BatchNormalization",
)  # fmt: skip
_SPATIAL = (
    "AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "Pad", "Resize",
    "Upsample",
)  # fmt: skip
_POINTWISE = (
    "Gelu", "Sigmoid", "Tanh", "Erf", "Exp", "Pow", "Sqrt", "HardSwish", "HardSigmoid", "Softplus", "Elu", "Swish",
    "Mish",
)  # fmt: skip
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")

POSITIVE = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Abs", "Max", "Min", "Clip", "MaxPool", "GlobalMaxPool", "LpPool", "GlobalLpPool"}
    | set(_REDUCTIONS[2:])
)

RULES: Mapping[str, Callable[[Region, ir.Node], None]] = {
    **dict.fromkeys(SAME | HOMOGENEOUS, unary),
    **dict.fromkeys(SUMS, sums),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_NORMS, norm),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(("Mul", "Div"), product),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshaping),
    **dict.fromkeys(("Attention", "GroupQueryAttention"), attention),
    **dict.fromkeys(("Conv", "ConvTranspose"), conv),
    **dict.fromkeys(("Shape", "Size"), _nothing),
    "Clip": clip,
    "Concat": concat,
    "Expand": expand,
    "Gather": gather,
    "Gemm": gemm,
    "MatMul": matmul,
    "Reciprocal": reciprocal,
    "RotaryEmbedding": rotary,
    "Slice": slicing,
    "Split": split,
    "Transpose": transpose,
}
