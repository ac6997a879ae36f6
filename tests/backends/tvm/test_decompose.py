"""Operators of opset 23 and 24 written out in older ones: the same function, by ONNX Runtime and by target cpu."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import qcompiler
from qcompiler.backends.tvm.backend import CpuBackend
from qcompiler.backends.tvm.decompose import decompose, refusal
from qcompiler.model import Model
from qcompiler.progress import Silent

pytest.importorskip("tvm")
if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

Feeds = dict[str, np.ndarray]
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def one_node(op: str, feeds: Feeds, names: list[str], outputs: int = 1, opset: int = 23, **attributes: Any) -> ir.Model:
    """A model of one node; the batch (first axis) of its inputs is dynamic."""
    made = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(a.dtype), [("n" if len(a) == 2 else len(a)), *a.shape[1:]]
        )
        for name, a in feeds.items()
    ]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, name="it", **attributes)
    graph = helper.make_graph(
        [node], "g", made, [helper.make_tensor_value_info(r, TensorProto.FLOAT, None) for r in results]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, feeds)]


def check(model: ir.Model, feeds: Feeds, folder: Path) -> None:
    """Written out it gives the same in ONNX Runtime, and on target cpu."""
    expected = run(model, feeds)
    written = model.clone()
    decompose(written)
    assert not {"Attention", "RotaryEmbedding", "Swish"} & {node.op_type for node in written.graph}
    for got, want in zip(run(written, feeds), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    backend = CpuBackend()
    backend.compile(Model(model, name="m", lowered=True), folder, Silent())
    outputs = backend.load(folder).run(feeds)
    for i, want in enumerate(expected):
        np.testing.assert_allclose(outputs[f"y{i}"], want, rtol=1e-5, atol=1e-5)


def qkv(flat: bool, heads: int = 4, kv_heads: int = 4, length: int = 5, keys: int = 5) -> Feeds:
    shapes = [(heads, length, 8), (kv_heads, keys, 8), (kv_heads, keys, 6)]
    found = [normal(2, *shape) for shape in shapes]
    if flat:
        found = [x.transpose(0, 2, 1, 3).reshape(2, x.shape[2], -1) for x in found]
    return dict(zip("qkv", found, strict=True))


LOWER = np.tril(np.ones((5, 5), bool))
PADDED = np.ones((2, 1, 5, 5), bool)
PADDED[0, :, :, :2] = False  # with is_causal the first two rows see nothing
CASES: dict[str, tuple[dict[str, Any], np.ndarray | None]] = {
    "plain": ({}, None),
    "causal": ({"is_causal": 1}, None),
    "scaled and capped": ({"scale": 0.3, "softcap": 1.5}, None),
    "bias": ({}, normal(5, 5)),
    "bias of minus infinity": ({}, np.where(PADDED & LOWER, 0, -np.inf).astype(np.float32)),
    "capped bias": ({"softcap": 2.0}, normal(2, 1, 5, 5)),
    "bool": ({}, LOWER),
    "capped bool": ({"softcap": 2.0}, LOWER),
    "capped causal": ({"softcap": 2.0, "is_causal": 1}, None),
    "causal and padded": ({"is_causal": 1}, PADDED),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_attention(case: str, kv_heads: int, flat: bool, tmp_path: Path) -> None:
    attributes, mask = CASES[case]
    feeds = qkv(flat, kv_heads=kv_heads)
    heads = {"q_num_heads": 4, "kv_num_heads": kv_heads} if flat else {}
    if mask is not None:
        feeds["mask"] = mask
    check(one_node("Attention", feeds, list(feeds), **heads, **attributes), feeds, tmp_path)


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_over_padded_keys(causal: int, tmp_path: Path) -> None:
    feeds = {**qkv(False, length=3), "lengths": np.array([3, 5], np.int64)}
    names = ["q", "k", "v", "", "", "", "lengths"]
    check(one_node("Attention", feeds, names, opset=24, is_causal=causal), feeds, tmp_path)


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_to_the_past(causal: int, tmp_path: Path) -> None:
    feeds = {**qkv(False, length=2, keys=2), "pk": normal(2, 4, 3, 8), "pv": normal(2, 4, 3, 6)}
    names = ["q", "k", "v", "", "pk", "pv"]
    check(one_node("Attention", feeds, names, outputs=3, is_causal=causal), feeds, tmp_path)


def test_attention_to_other_keys(tmp_path: Path) -> None:
    feeds = qkv(False, length=3, keys=7)
    check(one_node("Attention", feeds, list(feeds), is_causal=1), feeds, tmp_path)


def test_attention_with_unknown_heads_is_refused() -> None:
    feeds = qkv(False)
    model = one_node("Attention", feeds, list(feeds))
    model.graph.inputs[0].shape = ir.Shape(["n", "heads", 5, 8])
    assert refusal(next(iter(model.graph))) == "its number of heads is not known"


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("part", [0, 4])
def test_rotary_embedding(part: int, positions: bool, interleaved: int, flat: bool, tmp_path: Path) -> None:
    half = (part or 8) // 2
    x = normal(2, 5, 24) if flat else normal(2, 3, 5, 8)
    feeds: Feeds = {"x": x, "cos": normal(2, 5, half), "sin": normal(2, 5, half)}
    if positions:
        feeds |= {"cos": normal(9, half), "sin": normal(9, half), "ids": RNG.integers(0, 9, (2, 5))}
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": part}
    attributes |= {"num_heads": 3} if flat or part else {}
    check(one_node("RotaryEmbedding", feeds, list(feeds), **attributes), feeds, tmp_path)


@pytest.mark.parametrize("alpha", [1.0, 1.7])
def test_swish(alpha: float, tmp_path: Path) -> None:
    feeds = {"x": normal(2, 3, 4)}
    check(one_node("Swish", feeds, ["x"], opset=24, alpha=alpha), feeds, tmp_path)


def test_rms_normalization(tmp_path: Path) -> None:
    feeds = {"x": normal(2, 3, 8), "g": normal(8)}
    check(one_node("RMSNormalization", feeds, ["x", "g"], axis=-1, epsilon=1e-3), feeds, tmp_path)


class Llama(torch.nn.Module):
    """One block with grouped heads, and its embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        linear = lambda n, m: torch.nn.Linear(n, m, bias=False)  # noqa: E731
        self.embed, self.head = torch.nn.Embedding(96, 64), linear(64, 96)
        self.norm, self.norm2 = torch.nn.RMSNorm(64), torch.nn.RMSNorm(64)
        self.q, self.k, self.v, self.o = linear(64, 64), linear(64, 32), linear(64, 32), linear(64, 64)
        self.gate, self.up, self.down = linear(64, 128), linear(64, 128), linear(128, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return self.head(x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h)))


class Rotated(torch.nn.Module):
    """Attention of torch's own module over rows that a small stored table rotates."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(50, 8))
        self.inner, self.head = torch.nn.MultiheadAttention(64, 4, batch_first=True), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = x.unflatten(-1, (4, 16)).chunk(2, -1)
        table = self.table[: x.shape[1], None]
        x = torch.cat([one * table, two * table], -1).flatten(2)
        return self.head(self.inner(x, x, x, need_weights=False)[0])


def test_attention_module_of_torch_over_any_length_is_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=40)},)
    model = qcompiler.capture(Rotated(), (torch.randn(2, 7, 64),), dynamic_shapes=shapes)
    assert qcompiler.compile(model, "cpu", "6bits", output=tmp_path / "m.qc", resume=False).verified


@pytest.mark.parametrize("dynamic", [False, True])
def test_llama_block_from_torch_is_verified(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"ids": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)}} if dynamic else None
    model = qcompiler.capture(Llama(), (torch.randint(0, 96, (2, 7)),), dynamic_shapes=shapes)
    result = qcompiler.compile(model, "cpu", "6bits", output=tmp_path / "llama.qc", resume=False)
    assert result.verified
    assert (result.fidelity["sqnr_db"] or 0) > 15
