"""Modules from torch: same outputs, module paths kept."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.capture.torch import capture
from qcompiler.errors import BadModel, BadOption, MissingExtra

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
nn = torch.nn


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p.unflatten(-1, (4, 4)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def run(model: ir.Model, folder: Path, x: np.ndarray) -> np.ndarray:
    ir.save(model, folder / "m.onnx", external_data="m.data")
    session = ort.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize(("make", "shape"), [(Convolutional, (2, 3, 8, 8)), (Block, (2, 6, 16))])
def test_outputs_agree_for_any_batch(make: type[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make().eval()
    module.train()
    model = capture(module, (torch.randn(shape),))
    assert module.training
    module.eval()
    x = torch.randn(5, *shape[1:])
    np.testing.assert_allclose(run(model.ir, tmp_path, x.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_weights_and_nodes_carry_module_paths() -> None:
    model = capture(Block(), (torch.randn(2, 6, 16),), name="tiny")
    paths = {n.metadata_props.get("qcompiler.module") for n in model.graph if n.op_type == "MatMul"}
    assert paths == {"qkv", "out", "mlp.0", "mlp.2"}
    assert {f"{path}.weight" for path in paths} <= set(model.graph.initializers)
    assert model.name == "tiny"
    assert model.ir.opset_imports[""] == 23


def test_a_module_that_cannot_be_exported_is_refused() -> None:
    with pytest.raises(BadModel, match="torch cannot export"):
        capture(Branching(), (torch.randn(3),))


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (3, (), "a int is no torch.nn.Module"),
        (nn.Linear(3, 2), torch.zeros(2, 3), "a Tensor is not a tuple"),
        (nn.Linear(3, 2), 3, "a int is not a tuple"),
        (nn.Linear(3, 2), (), "cannot be called with them"),
        (nn.Linear(3, 2), {"y": torch.zeros(2, 3)}, "cannot be called with them"),
    ],
)
def test_wrong_arguments_are_named(module: Any, inputs: Any, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        capture(module, inputs)


def test_without_torch_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'qcompiler\[torch\]'"):
        capture(nn.Identity(), ())


def test_public_name_works_after_parts_of_the_package_were_imported() -> None:
    import qcompiler

    import_module("qcompiler.capture.onnx")  # binds the package to the name qcompiler.capture
    public: Any = qcompiler
    for _ in range(2):
        assert public.capture(nn.Linear(3, 2), (torch.zeros(2, 3),)).name == "linear"
