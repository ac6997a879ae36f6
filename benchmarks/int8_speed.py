"""Speed of a compiled artifact beside the file that ONNX Runtime's own quantizer makes of the same model.

    python benchmarks/int8_speed.py ARTIFACT --model M.onnx --calib X.npz [--seconds 20]

Both run in one process, in turns; the ratio of medians is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import qcompiler


class Reader(CalibrationDataReader):
    """Single samples of an .npz."""

    def __init__(self, data: dict[str, np.ndarray], count: int) -> None:
        self._feeds = iter([{k: v[i : i + 1] for k, v in data.items()} for i in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        """The next sample."""
        return next(self._feeds, None)


def main() -> None:
    parser = argparse.ArgumentParser(description="speed beside ONNX Runtime's own int8 file")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    data = dict(np.load(args.calib))
    feed = {k: v[:1] for k, v in data.items()}
    ours = qcompiler.load(args.artifact)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own.onnx"
        quantize_static(
            args.model, own, Reader(data, 32), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        options: Any = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(own), options, providers=["CPUExecutionProvider"])
        runs = {"artifact": lambda: ours.run(feed), "ort_int8": lambda: session.run(None, feed)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[3:]) for name, values in times.items()}
    print(json.dumps(medians | {"speed_of_ort_int8": medians["ort_int8"] / medians["artifact"]}))


if __name__ == "__main__":
    main()
