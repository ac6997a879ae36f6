"""A torch module in, an artifact out.

python examples/from_torch.py
"""

from __future__ import annotations

import torch

import qcompiler as qc


def main(output: str = "torch.qc") -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
    ).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    model = qc.capture(module, (torch.randn(4, 64),), dynamic_shapes=({0: batch},), name="mlp")
    feeds = [{model.graph.inputs[0].name: torch.randn(16, 64).numpy()} for _ in range(8)]
    result = qc.compile(model, target="onnx", budget="5bits", calibration=feeds, output=output)
    print(f"{result.bits_per_weight:.3f} bits per weight, {result.fidelity['sqnr_db']:.1f} dB")


if __name__ == "__main__":
    main()
