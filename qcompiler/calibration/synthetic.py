"""Inputs made by the compiler, for models that come without data.

Floats are Gaussian; image inputs get structure at several scales, as photographs have. Integers that index
a table stay within it, masks are ones. A causal language model writes its own text, sampled token by token
from random first tokens (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.integers import IntegerInput, integer_inputs
from qcompiler.calibration.text import companion
from qcompiler.calibration.validate import dims, input_dtype
from qcompiler.errors import BadModel, QcompilerError
from qcompiler.measure.runner import Runner

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
_SIDES = (224, 64, 256, 32, 28)  # of images, tried in this order
_LENGTHS = (64, 16, 128, 8, 1)  # of sequences
_TEXT_ROWS, _TEXT_LENGTH = 4, 64  # the cost grows with rows * length^2
_MAX_ELEMENTS = 1 << 28
_SETTINGS = 4  # values of inputs that are single numbers, each with its part of the samples


def synthetic_feeds(model: ir.Model, samples: int, seed: int, *, text: bool) -> tuple[list[Feeds], str]:
    """Made-up batches, and what they are in words.

    Args:
        model: runnable; it is run on one sample to see which sizes it takes.
        samples: how many, except for self-generated text, of which there are 4 windows of 64 tokens at most.
        seed: same seed, same data.
        text: whether a language model may write its own.

    Raises:
        BadModel: no made-up input runs.
    """
    rng, roles, runner = np.random.default_rng(seed), integer_inputs(model), Runner(model)
    own = _text(model, roles, runner, min(samples, _TEXT_ROWS), rng) if text else None
    if own is not None:
        return [own], "text written by the model itself"
    sizes = _working_sizes(model, roles, runner, rng)
    several = _SETTINGS if any(dims(v) == () for v in model.graph.inputs) else 1
    batch = 1 if _separate(model) else max(1, min(samples // several, _fixed_batch(model) or samples))
    calls = [_random(model, roles, sizes, batch, rng) for _ in range(max(1, -(-samples // batch)))]
    return calls, f"{samples} random inputs"


def _separate(model: ir.Model) -> bool:
    """Whether inputs share no batch axis: some first dimensions are fixed, others not, or they differ."""
    return len({(dims(v) or (None,))[0] for v in model.graph.inputs}) > 1


def _fixed_batch(model: ir.Model) -> int | None:
    return (dims(model.graph.inputs[0]) or (None,))[0]


def _working_sizes(model: ir.Model, roles: list[IntegerInput], run: Run, rng: np.random.Generator) -> tuple[int, int]:
    """The first (image side, sequence length) that the model runs with."""
    last: QcompilerError | None = None
    for sizes in [(s, _LENGTHS[0]) for s in _SIDES] + [(_SIDES[0], n) for n in _LENGTHS[1:]]:
        feeds = _random(model, roles, sizes, 1 if _separate(model) else _fixed_batch(model) or 1, rng)
        try:
            run(feeds)
            return sizes
        except QcompilerError as error:
            last = error
    where = str(model.meta.get("file", "the model"))
    fix = "give calibration data that it runs with, or repair the model"
    raise BadModel(f"runs with no input that could be made up ({last})", where, fix) from last


def _random(
    model: ir.Model, roles: list[IntegerInput], sizes: tuple[int, int], batch: int, rng: np.random.Generator
) -> Feeds:
    by_name = {role.name: role for role in roles}
    feeds: Feeds = {}
    for value in model.graph.inputs:
        shape = _concrete(value, sizes, batch, separate=_separate(model))
        role, dtype = by_name.get(str(value.name)), input_dtype(value)
        if role is None:
            feeds[str(value.name)] = _floats(shape, rng).astype(dtype)
        elif role.role in ("mask", "types"):
            feeds[str(value.name)] = np.full(shape, int(role.role == "mask"), dtype)
        elif role.role == "positions" and shape:
            feeds[str(value.name)] = np.broadcast_to(np.arange(shape[-1]) % role.size, shape).astype(dtype)
        else:
            high = 256 if dtype == np.uint8 and role.role == "codes" else role.size
            feeds[str(value.name)] = rng.integers(0, high, shape).astype(dtype)
    return feeds


def _concrete(value: ir.Value, sizes: tuple[int, int], batch: int, *, separate: bool) -> tuple[int, ...]:
    """A shape with every free dimension chosen."""
    shape = dims(value)
    if shape is None:
        raise BadModel(f"input '{value.name}' has no shape", fix="give calibration data")
    side, length = sizes
    free = side if len(shape) >= 4 else length
    chosen = [free if d is None else d for d in shape]
    if shape and shape[0] is None and not separate:
        chosen[0] = batch
    if np.prod(chosen, dtype=np.float64) > _MAX_ELEMENTS:
        raise BadModel(f"input '{value.name}' of shape {chosen} is too large to make up", fix="give calibration data")
    return tuple(chosen)


def _floats(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Standard normal values; four dimensions get the spectrum of pictures over the last two."""
    noise = rng.standard_normal(shape, np.float32)
    if len(shape) != 4 or min(shape[2:]) < 8:
        return noise
    total = 0.3 * noise
    for cell in (2, 8, 32):
        coarse = (*shape[:2], -(-shape[2] // cell), -(-shape[3] // cell))
        blocks = rng.standard_normal(coarse, np.float32).repeat(cell, 2).repeat(cell, 3)
        total += blocks[:, :, : shape[2], : shape[3]]
    return (total / total.std()).astype(np.float32)


def _text(model: ir.Model, roles: list[IntegerInput], run: Run, rows: int, rng: np.random.Generator) -> Feeds | None:
    """Self-generated text if this is a causal language model of free length: token ids in, logits out."""
    tokens = [r for r in roles if r.role == "tokens"]
    if len(tokens) != 1 or len(roles) != len(model.graph.inputs):
        return None
    shape = dims(next(v for v in model.graph.inputs if v.name == tokens[0].name))
    logits = next((str(v.name) for v in model.graph.outputs if (dims(v) or ())[2:] == (tokens[0].size,)), None)
    if shape is None or len(shape) != 2 or shape[1] is not None or logits is None:
        return None
    types = {str(v.name): input_dtype(v) for v in model.graph.inputs}

    def feeds(ids: Array) -> Feeds:
        return {r.name: companion(r, ids).astype(types[r.name]) for r in roles}

    first = rng.integers(0, tokens[0].size, (shape[0] or rows, 2))
    ids = _written(lambda ids: run(feeds(ids))[logits], first, rng)
    return None if ids is None else feeds(ids)


def _written(predict: Callable[[Array], Array], ids: Array, rng: np.random.Generator) -> Array | None:
    """Continue ids [rows, 2] to the full length by sampling; None if the model is not causal or does not run."""
    start: Array | None = None
    while ids.shape[1] < _TEXT_LENGTH:
        try:
            out = predict(ids)
        except QcompilerError:
            return None
        # The first position sees nothing but itself: if it changes with what follows, this is no causal model.
        if start is not None and not np.allclose(start, out[:, 0], rtol=1e-2, atol=1e-2):
            return None
        start, noise = out[:, 0].astype(np.float32), rng.gumbel(size=out[:, -1].shape)
        ids = np.concatenate([ids, (out[:, -1] + noise).argmax(-1)[:, None]], 1)
    return ids
