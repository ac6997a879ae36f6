"""What the installed ONNX Runtime can do, found out by running it: one tiny session a question, asked once."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.backends.onnx.session import session_options
from qcompiler.formats.packing import pack_plane

BLOCKS = (256, 128, 64, 32, 16)  # what MatMulNBits has taken in any release; the probe decides
EXACT, INT8_ACTIVATIONS = 0, 4  # accuracy_level of MatMulNBits
_ROWS, _TOLERANCE = 24, {EXACT: 1e-5, INT8_ACTIVATIONS: 3e-2}


@cache
def runs_matmul_nbits(bits: int, block: int, accuracy: int) -> bool:
    """Whether MatMulNBits gives the right numbers, with and without zero points, ragged columns and a bias."""
    return all(_matmul_error(bits, block, accuracy, zeros) < _TOLERANCE[accuracy] for zeros in (False, True))


@cache
def runs_gather_blocks(bits: int, block: int) -> bool:
    """Whether GatherBlockQuantized gives exactly the decoded rows, with and without zero points."""
    return all(_gather_error(bits, block, zeros) == 0 for zeros in (False, True))


@cache
def runs_row_products() -> bool:
    """Whether MatMulInteger of uint8 and int8 is exact at the extremes: without VNNI some kernels saturate."""
    codes, weight = np.full((3, 64), 255, np.uint8), np.full((64, _ROWS), -127, np.int8)
    weight[:, ::2] = 127
    constants = {"w": weight, "middle": np.asarray(1, np.uint8)}
    y = _run("MatMulInteger", ["x", "w", "middle"], constants, {"x": codes}, {}, "")
    return y is not None and np.array_equal(y, 254 * 64 * np.broadcast_to(weight[:1].astype(int), y.shape))


def _random_blocks(bits: int, block: int, columns: int, zeros: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Packed codes, scales and zero points of a [rows, columns] matrix, and what they mean."""
    rng, blocks = np.random.default_rng(bits * 1000 + block), -(-columns // block)
    codes = rng.integers(0, 1 << bits, (_ROWS, blocks, block))
    scale = rng.uniform(0.5, 1.5, (_ROWS, blocks)).astype(np.float32)
    zero = rng.integers(0, 1 << bits, (_ROWS, blocks)) if zeros else np.full((_ROWS, blocks), 1 << (bits - 1))
    decoded = ((codes - zero[..., None]) * scale[..., None]).reshape(_ROWS, -1)[:, :columns].astype(np.float32)
    packed = {"codes": pack_plane(codes, bits), "scale": scale}
    return packed | ({"zero": pack_plane(zero, bits)} if zeros else {}), decoded


def _matmul_error(bits: int, block: int, accuracy: int, zeros: bool) -> float:
    columns = 3 * block - 4
    constants, decoded = _random_blocks(bits, block, columns, zeros)
    rng = np.random.default_rng(0)
    constants["bias"] = rng.standard_normal(_ROWS).astype(np.float32)
    names = ["x", "codes", "scale", "zero" if zeros else "", "", "bias"]
    attributes = {"K": columns, "N": _ROWS, "bits": bits, "block_size": block, "accuracy_level": accuracy}
    worst = 0.0
    for tokens in (1, 5):  # ONNX Runtime has kernels of their own for one row
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        y = _run("MatMulNBits", names, constants, {"x": x}, attributes)
        want = x.astype(np.float64) @ decoded.T + constants["bias"]
        worst = max(worst, float("inf") if y is None else float(np.linalg.norm(y - want) / np.linalg.norm(want)))
    return worst


def _gather_error(bits: int, block: int, zeros: bool) -> float:
    constants, decoded = _random_blocks(bits, block, 2 * block, zeros)
    constants["codes"] = constants["codes"].reshape(_ROWS, -1)
    indices = np.array([[3, 0], [_ROWS - 1, 3]], np.int64)
    names = ["codes", "indices", "scale", *(["zero"] if zeros else [])]
    attributes = {"bits": bits, "block_size": block, "quantize_axis": 1, "gather_axis": 0}
    y = _run("GatherBlockQuantized", names, constants, {"indices": indices}, attributes)
    return float("inf") if y is None else float(np.abs(y - decoded[indices]).max())


def _run(
    op: str,
    names: list[str],
    constants: dict[str, np.ndarray],
    feeds: dict[str, np.ndarray],
    attributes: dict[str, int],
    domain: str = "com.microsoft",
) -> np.ndarray | None:
    """The result of one operation, or None if ONNX Runtime will not run it."""
    values = {n: ir.val(n, const_value=ir.tensor(a, name=n)) for n, a in constants.items()}
    inputs = {n: ir.val(n, dtype=ir.DataType.from_numpy(a.dtype), shape=a.shape) for n, a in feeds.items()}
    operands = [(values | inputs).get(n) for n in names]
    node = ir.node(op, operands, attributes, domain=domain)
    node.outputs[0].name = "y"
    node.outputs[0].dtype = ir.DataType.INT32 if op == "MatMulInteger" else ir.DataType.FLOAT
    imports = {"": 21, "com.microsoft": 1}
    held = list(values.values())
    graph = ir.Graph(
        list(inputs.values()), node.outputs, nodes=[node], initializers=held, opset_imports=imports, name="probe"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    try:
        options = session_options(1)
        options.log_severity_level = 4  # a refusal is an answer here, not an error
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, feeds)[0])
    except Exception:  # ONNX Runtime's exceptions have no common base; whatever it is, the answer is no
        return None
