"""Task figures of a compiled model against its float original, on the public split only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from assets import feeds

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def float_runner(path: Path, threads: int = 2) -> Run:
    """ONNX Runtime on the float original."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def run(data: Mapping[str, Array]) -> dict[str, Array]:
        return {name: np.asarray(v) for name, v in zip(names, session.run(None, dict(data)), strict=True)}

    return run


def _log_softmax(z: Array) -> Array:
    z = z.astype(np.float64) - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _sqnr(reference: Array, output: Array) -> float:
    noise = float(((output.astype(np.float64) - reference) ** 2).sum())
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(noise, 1e-30)))


def _all_outputs(run: Run, data: Mapping[str, Array], batch: int, count: int | None) -> Array:
    total = min(len(next(iter(data.values()))), count or 10**9)
    parts = []
    for i in range(0, total, batch):
        parts.append(next(iter(run({k: v[i : min(i + batch, total)] for k, v in data.items()}).values())))
    return np.concatenate(parts)


def classification(run: Run, original: Run, data: Mapping[str, Array], batch: int = 16) -> dict[str, float]:
    """Agreement with the float model: top-1, KL in nats, SQNR of the first output."""
    out, ref = _all_outputs(run, data, batch, None), _all_outputs(original, data, batch, None)
    p, q = _log_softmax(ref), _log_softmax(out)
    return {
        "top1_agreement": float((out.argmax(-1) == ref.argmax(-1)).mean()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "sqnr_db": _sqnr(ref, out),
    }


def embedding(run: Run, original: Run, data: Mapping[str, Array], batch: int = 32) -> dict[str, float]:
    """SQNR of the embeddings of bodies (even rows) and titles (odd rows), apart."""
    figures = {}
    for name, start in (("body", 0), ("title", 1)):
        part = {k: v[start::2] for k, v in data.items()}
        out, ref = _all_outputs(run, part, batch, None), _all_outputs(original, part, batch, None)
        figures[f"{name}_sqnr_db"] = _sqnr(ref, out)
        figures[f"{name}_cosine"] = float((ref * out).sum(-1).mean())
    return figures


def perplexity(run: Run, original: Run, data: Mapping[str, Array], windows: int = 12) -> dict[str, float]:
    """Perplexity over fp32's on the first windows of each corpus (bbc at even rows, wiki at odd)."""
    figures: dict[str, float] = {}
    losses: dict[str, list[float]] = {"bbc": [], "wiki": []}
    base: dict[str, list[float]] = {"bbc": [], "wiki": []}
    for i in range(2 * windows):
        ids = data["input_ids"][i : i + 1]
        corpus = ("bbc", "wiki")[i % 2]
        for table, one in ((losses, run), (base, original)):
            logits = next(iter(one({"input_ids": ids}).values()))[:, :-1].astype(np.float32)
            top = logits.max(-1, keepdims=True)
            norm = np.log(np.exp(logits - top).sum(-1, dtype=np.float64)) + top[..., 0]
            picked = np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
            table[corpus].append(float((norm - picked).mean()))
    for corpus in losses:
        figures[f"{corpus}_ppl"] = float(np.exp(np.mean(losses[corpus])))
        figures[f"{corpus}_ratio"] = float(np.exp(np.mean(losses[corpus]) - np.mean(base[corpus])))
    both = [np.mean(losses[c]) - np.mean(base[c]) for c in losses]
    figures["ratio"] = float(np.exp(np.mean(both)))
    return figures


def figures(model: str, run: Run, assets: Path) -> dict[str, float]:
    """The figures that suit a model of the assets folder; plain SQNR of the first output otherwise."""
    original = float_runner(assets / "models" / f"{model}.onnx")
    data = feeds(assets, model, "public")
    if data is None:
        return {}
    if model == "smollm2_135m":
        return perplexity(run, original, data)
    if model == "minilm_l6_v2":
        return embedding(run, original, data)
    if model in ("efficientnet_lite0", "mobilenet_v2", "digits_cnn", "magika", "face_rnet"):
        return classification(run, original, data)
    small = {k: v[:48] for k, v in data.items()}
    out, ref = _all_outputs(run, small, 8, None), _all_outputs(original, small, 8, None)
    return {"sqnr_db": _sqnr(ref, out)}
