"""The models and data of an assets folder, as feeds named after the models' inputs.

The folder holds `models/NAME.onnx` and `data/*_{calib,public}.npz`; benchmarks calibrate on `calib` only and
evaluate on `public` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
MODELS = ("efficientnet_lite0", "mobilenet_v2", "minilm_l6_v2", "smollm2_135m", "ppocrv5_rec", "ppocrv5_det",
          "magika", "silero_vad", "digits_cnn", "face_rnet")  # fmt: skip
CPU_MODELS = MODELS[:5]
_NORMALISATION = {
    "mobilenet_v2": (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
    "efficientnet_lite0": (np.full(3, 0.5), np.full(3, 0.5)),
}


def _nchw(pixels: npt.NDArray[np.uint8], mean: npt.NDArray[Any], std: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    scaled = (pixels.astype(np.float32) / 255.0 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def feeds(assets: Path, model: str, split: str) -> Arrays | None:
    """Inputs of a model for one split ("calib" or "public"), samples first; None where there is no data."""
    data = assets / "data"
    half = np.full(3, 0.5)
    if model in _NORMALISATION:
        return {"images": _nchw(np.load(data / f"images_{split}.npz")["pixels"], *_NORMALISATION[model])}
    if model == "minilm_l6_v2":
        z = np.load(data / f"sentences_{split}.npz")
        title = [np.pad(z[f"title_{k}"].astype(np.int64), ((0, 0), (0, 96))) for k in ("ids", "mask")]
        body = [z[f"body_{k}"].astype(np.int64) for k in ("ids", "mask")]
        mixed = [np.stack([b, t], 1).reshape(-1, 128) for b, t in zip(body, title, strict=True)]
        return {"input_ids": mixed[0], "attention_mask": mixed[1]}
    if model == "smollm2_135m":
        z = np.load(data / f"text_{split}.npz")
        mixed = np.stack([z["bbc"], z["wiki"]], 1).reshape(-1, 512)
        return {"input_ids": mixed.astype(np.int64)}
    if model == "ppocrv5_rec":
        return {"x": _nchw(np.load(data / f"ocr_{split}.npz")["lines"], half, half)}
    if model == "ppocrv5_det":
        lines = np.load(data / f"ocr_{split}.npz")["lines"][:48]
        pages = lines.reshape(8, 6, 48, 480, 3).reshape(8, 288, 480, 3)
        return {"x": _nchw(pages, half, half)}
    named = {
        "digits_cnn": ("digits", "images"),
        "face_rnet": ("faces", "crops"),
        "magika": ("magika", "bytes"),
    }
    if model in named:
        file, name = named[model]
        return {name: np.load(data / f"{file}_{split}.npz")["x"]}
    return None


def write_calibration(assets: Path, model: str, folder: Path) -> Path | None:
    """The calib split as FOLDER/MODEL.npz, what `--calib` takes; None where there is no data."""
    arrays = feeds(assets, model, "calib")
    if arrays is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model}.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
