"""What rounding the rows of a value means, as the bodies of two functions (see `qcompiler.graph.functions`)."""

from __future__ import annotations

ROWS_BODY = """
  magnitude = Abs (x)
  last = Constant <value_ints: ints = [-1]> ()
  reach = ReduceMax <keepdims = 1> (magnitude, last)
  limit = Constant <value_float: float = 127.0> ()
  step = Div (reach, limit)
  nothing = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  empty = Equal (step, nothing)
  scale = Where (empty, one, step)
  ratio = Div (x, scale)
  nearest = Round (ratio)
  lowest = Constant <value_float: float = -127.0> ()
  code = Clip (nearest, lowest, limit)
  y = Mul (code, scale)
"""
ROWS_TO_BODY = """
  magnitude = Abs (x)
  last = Constant <value_ints: ints = [-1]> ()
  whole = ReduceMax <keepdims = 1> (magnitude, last)
  share = Constant <value_float: float = @clip> ()
  reach = Mul (whole, share)
  limit = Constant <value_float: float = @limit> ()
  step = Div (reach, limit)
  nothing = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  empty = Equal (step, nothing)
  scale = Where (empty, one, step)
  ratio = Div (x, scale)
  nearest = Round (ratio)
  lowest = Neg (limit)
  code = Clip (nearest, lowest, limit)
  y = Mul (code, scale)
"""
