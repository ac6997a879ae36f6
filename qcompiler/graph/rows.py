"""What rounding the rows of a value means: the bodies of two functions (`graph.functions`), and the same in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_BODY = """
  magnitude = Abs (x)
  last = Constant <value_ints: ints = [-1]> ()
{reach}
  step = Div (reach, limit)
  nothing = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  empty = Equal (step, nothing)
  scale = Where (empty, one, step)
  ratio = Div (x, scale)
  nearest = Round (ratio)
  lowest = {lowest}
  code = Clip (nearest, lowest, limit)
  y = Mul (code, scale)
"""
ROWS_BODY = _BODY.format(
    reach="""  reach = ReduceMax <keepdims = 1> (magnitude, last)
  limit = Constant <value_float: float = 127.0> ()""",
    lowest="Constant <value_float: float = -127.0> ()",
)
ROWS_TO_BODY = _BODY.format(
    reach="""  whole = ReduceMax <keepdims = 1> (magnitude, last)
  share = Constant <value_float: float = @clip> ()
  reach = Mul (whole, share)
  limit = Constant <value_float: float = @limit> ()""",
    lowest="Neg (limit)",
)


def row_limit(bits: int) -> int:
    """The largest code of symmetric rows of this width."""
    return (1 << (bits - 1)) - 1


def rounded(x: Floats, bits: int, clip: float) -> Floats:
    """The numbers that codes stand for: float32 of the shape of `x`, equal to what the functions give.

    Args:
        x: float32 [..., K].
        bits: of the codes.
        clip: share of a row's largest magnitude that the largest code stands for.
    """
    limit = np.float32(row_limit(bits))
    scale = np.abs(x).max(axis=-1, keepdims=True, initial=0) * np.float32(clip) / limit
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.asarray(np.clip(np.rint(x / scale), -limit, limit) * scale, np.float32)
