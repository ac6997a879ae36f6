"""Perplexity of causal language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadData

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]


def perplexity(
    run: Run, tokens: Array, *, input_name: str = "input_ids", output_name: str = "logits", batch: int = 1
) -> dict[str, float]:
    """Exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        run: from feeds to outputs by name, such as a `Runner`.
        tokens: integers [windows, context]; each window is judged by itself.
        input_name: the model's input for token numbers, int64 [batch, context].
        output_name: its output of logits, [batch, context, vocabulary].
        batch: windows at a time.

    Returns:
        ppl, nll (nats per token) and tokens (how many were judged).

    Raises:
        BadData: there is no token to judge, or a token lies outside the vocabulary.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise BadData(f"tokens of shape {tokens.shape} hold nothing to predict", fix="give [windows, context >= 2]")
    total, count = 0.0, 0
    for start in range(0, len(tokens), batch):
        ids = tokens[start : start + batch].astype(np.int64)
        logits = np.asarray(run({input_name: ids})[output_name])
        if ids.min() < 0 or ids.max() >= logits.shape[-1]:
            raise BadData(f"a token lies outside 0 ... {logits.shape[-1] - 1}", fix="use the model's own tokenizer")
        for window, scores in zip(ids, logits, strict=True):
            total += _negative_log_likelihood(scores[:-1].astype(np.float32), window[1:])
            count += len(window) - 1
    return {"ppl": float(np.exp(total / count)), "nll": total / count, "tokens": float(count)}


def _negative_log_likelihood(scores: npt.NDArray[np.float32], targets: Array) -> float:
    top = scores.max(-1, keepdims=True)
    norm = np.log(np.exp(scores - top).sum(-1, dtype=np.float64)) + top[:, 0]
    picked = np.take_along_axis(scores, targets[:, None], -1)[:, 0]
    return float((norm - picked).sum())
