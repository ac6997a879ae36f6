"""Windows of tokens from a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import Tokenizer

from qcompiler.calibration.integers import IntegerInput, integer_inputs
from qcompiler.calibration.validate import dims
from qcompiler.errors import BadData

WINDOW = 512  # tokens, for models that take any length
_MAX_TEXT = 1 << 22  # bytes of text that are looked at: thousands of windows
_SHORTEST = 8


def token_windows(path: Path, tokenizer: Path, model: ir.Model) -> dict[str, npt.NDArray[Any]]:
    """Successive windows of a text for all inputs of a language model.

    Tokens go to the input that indexes the largest embedding; inputs that index smaller tables get positions
    or zeros, inputs that index nothing (attention masks) ones. Windows have the model's sequence length, or
    512 tokens where it takes any, or the whole text where that is shorter. Special tokens that the tokenizer
    adds to a text ([CLS], [SEP]) are added to every window.

    Args:
        path: UTF-8 text, of which the first 4 MB are used.
        tokenizer: a tokenizer.json.
        model: whose inputs are filled.

    Returns:
        Input name -> int64 [windows, length].

    Raises:
        BadData: not text, no tokenizer, not a language model, a vocabulary larger than the model's, too short.
    """
    where, roles = str(path), integer_inputs(model)
    ids = [r for r in roles if r.role == "tokens"]
    others = [str(v.name) for v in model.graph.inputs if str(v.name) not in {r.name for r in roles}]
    if len(ids) != 1 or others:
        raise BadData("the model does not take a text alone", where, "give .npz data with all inputs")
    windows = _windows(_read(path), tokenizer, _fixed_length(model, ids[0].name), where)
    if int(windows.max()) >= ids[0].size:
        raise BadData(
            f"holds token {int(windows.max())}, the model knows {ids[0].size}",
            str(tokenizer),
            "give the model's own tokenizer",
        )
    return {role.name: companion(role, windows) for role in roles}


def companion(role: IntegerInput, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What an integer input gets beside the tokens [windows, length]."""
    if role.role == "tokens":
        return tokens
    if role.role == "positions":
        return np.broadcast_to(np.arange(tokens.shape[1]) % role.size, tokens.shape).copy()
    return np.zeros_like(tokens) if role.role == "types" else np.ones_like(tokens)


def _fixed_length(model: ir.Model, name: str) -> int | None:
    value = next(v for v in model.graph.inputs if v.name == name)
    shape = dims(value)
    if shape is None or len(shape) != 2:
        raise BadData("the model does not take rows of tokens", name, "give .npz data")
    return shape[1]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT)
    except OSError as error:
        raise BadData(f"cannot be read ({error.strerror})", str(path)) from error
    if b"\0" in data:
        raise BadData("is no text file", str(path), "give UTF-8 text, .npz, .npy or a folder of images")
    try:
        return data.decode("utf-8", errors="strict" if len(data) < _MAX_TEXT else "ignore")
    except UnicodeDecodeError as error:
        raise BadData("is not UTF-8 text", str(path), "convert it with iconv") from error


def _windows(text: str, tokenizer: Path, length: int | None, where: str) -> npt.NDArray[Any]:
    try:
        encoder: Any = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BadData(f"cannot be read as tokenizer.json ({error})", str(tokenizer)) from error
    encoder.no_truncation()
    encoder.no_padding()
    wrap = int(encoder.num_special_tokens_to_add(False))
    whole = encoder.encode(text, add_special_tokens=False)
    size = min(length or WINDOW, len(whole) + wrap) if length is None else length
    if len(whole) + wrap < size or size - wrap < min(_SHORTEST, size):
        raise BadData(f"gives {len(whole)} tokens", where, f"give at least {max(size - wrap, _SHORTEST)}")
    whole.truncate(size - wrap)
    parts = [encoder.post_process(part, None, True).ids for part in (whole, *whole.overflowing)]
    return np.asarray([part for part in parts if len(part) == size], np.int64)
