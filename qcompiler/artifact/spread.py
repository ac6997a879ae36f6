"""How far two valid executions of one quantized network may be apart, measured on its QDQ reference.

Where activations are rounded, a last-bit difference before a rounding now and then gives another code, the next
layer's codes differ more, and after enough layers the rounding errors are nearly independent. How much of that
reaches the outputs depends on the model and on the input, so no fixed tolerance is right: 0.2 would hide a wrong
layer of a shallow network, 0.01 would refuse a right deep one. Here the reference itself is run again with every
number that is about to be rounded moved by as little as the target's arithmetic may move it; the artifact may be
only a few times as far from the reference as those runs are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.artifact.verify import distances
from qcompiler.graph.functions import DOMAIN, rounds_rows
from qcompiler.measure.runner import Runner
from qcompiler.target import Feeds, Outputs

NOISE, SEED = "qcompiler.noise", "qcompiler.noise_seed"  # names of the inputs that `noisy` adds
DRAWS = 3
_SUMS = ("GlobalAveragePool", "ReduceMean", "ReduceSum")
_HALF_STEP = 2.0**-24  # of float32
_JITTER = "Jitter"
# x + noise * reach * u, u in [-1, 1) a hash of x: a fraction of x in steps far below any code, which costs a few
# cheap operations where a random generator would take longer than the network.
_BODY = """
  tiny = Constant <value_float: float = 1e-30> ()
  most = Max (reach, tiny)
  fine = Constant <value_float: float = 200003.0> ()
  factor = Div (fine, most)
  scaled = Mul (x, factor)
  moved = Add (scaled, seed)
  below = Floor (moved)
  fraction = Sub (moved, below)
  half = Constant <value_float: float = 0.5> ()
  centred = Sub (fraction, half)
  two = Constant <value_float: float = 2.0> ()
  size = Mul (noise, two)
  amount = Mul (size, reach)
  shift = Mul (centred, amount)
  y = Add (x, shift)
"""


def noisy(model: ir.Model) -> ir.Model:
    """A copy of a lowered model with two more inputs, float32 scalars: how large the noise is, and its seed.

    The noise is uniform in plus or minus that part of the reach of each rounding: of the range that a
    QuantizeLinear can hold, of the largest magnitude of a row for QuantizeRows. At 0 the copy is the model.
    """
    copy = model.clone()
    graph = copy.graph
    scalars = [ir.val(name, ir.DataType.FLOAT, ir.Shape([])) for name in (NOISE, SEED)]
    for number, node in enumerate([n for n in graph if _rounds(n)]):
        x = node.inputs[0]
        assert x is not None
        reach = _range(graph, node, number) if node.op_type == "QuantizeLinear" else _largest(graph, node)
        made = ir.node(_JITTER, [x, reach, *scalars], domain=DOMAIN, name=f"jitter_{number}")
        graph.insert_before(node, made)
        node.replace_input_with(0, made.outputs[0])
    graph.inputs.extend(scalars)
    opset = graph.opset_imports.get("", 21)
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{_JITTER} (x, reach, noise, seed) => (y) {{{_BODY}}}'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    copy.functions[function.identifier()] = function
    graph.opset_imports.setdefault(DOMAIN, 1)
    return copy


def _rounds(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("", "QuantizeLinear") or rounds_rows(node)


def _range(graph: ir.Graph, node: ir.Node, number: int) -> ir.Value:
    """255 steps, the range of an 8-bit code."""
    steps = ir.val(f"{_JITTER}_steps_{number}", const_value=ir.tensor(np.float32(255)))
    graph.register_initializer(steps)
    made = ir.node("Mul", [node.inputs[1], steps])
    graph.insert_before(node, made)
    return made.outputs[0]


def _largest(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """max|x| over the last axis."""
    axis = ir.node("Constant", [], {"value_ints": [-1]})
    magnitude = ir.node("Abs", [node.inputs[0]])
    made = ir.node("ReduceMax", [magnitude.outputs[0], axis.outputs[0]], {"keepdims": 1})
    graph.insert_before(node, [axis, magnitude, made])
    return made.outputs[0]


class Reference:
    """The QDQ reference, run as it is and with noise; one session serves both.

    Args:
        model: lowered.
        noise: `Tolerance.noise`; the spread is zero without it, and where nothing is rounded.
    """

    def __init__(self, model: ir.Model, noise: float) -> None:
        self._noise = noise if any(_rounds(node) for node in model.graph) else 0.0
        self._model = model
        self._runner = Runner(noisy(model) if self._noise else model)

    def __call__(self, feeds: Feeds) -> Outputs:
        """All outputs of the reference as it is."""
        return self._run(feeds, 0.0, 0)

    def spread(
        self, feeds: Feeds, outputs: Outputs, draws: Iterable[int] = range(DRAWS), long_sums: bool = False
    ) -> dict[str, float]:
        """For every output, the largest distance of noisy runs from `outputs`, those of the run without noise.

        Args:
            feeds: a batch of inputs.
            outputs: of the reference on them.
            draws: numbers that choose the noise; each costs a run.
            long_sums: let the noise be what the order of the longest sum of activations can do, if that is more.
        """
        noise = max(self._noise, self._noise_of_sums(feeds)) if self._noise and long_sums else self._noise
        widest = dict.fromkeys(outputs, 0.0)
        for draw in draws if self._noise else ():
            found = distances(self._run(feeds, noise, draw), outputs)
            widest = {name: max(widest[name], found[name]) for name in widest}
        return widest

    def _noise_of_sums(self, feeds: Feeds) -> float:
        """Two orders of a sum of n numbers of one size differ by about sqrt(n) half steps (pools over whole images)."""
        sums = [(n.inputs[0], n.outputs[0]) for n in self._model.graph if n.domain == "" and n.op_type in _SUMS]
        names = [(str(x.name), str(y.name)) for x, y in sums if x is not None]
        if not names:
            return 0.0
        found = Runner(self._model, outputs=[name for pair in names for name in pair])(feeds)
        longest = max(found[x].size / max(found[y].size, 1) for x, y in names)
        return _HALF_STEP * float(np.sqrt(longest))

    def _run(self, feeds: Feeds, noise: float, draw: int) -> Outputs:
        if not self._noise:
            return self._runner(feeds)
        seed = (draw + 1) * 0.381966  # shifts the hash; multiples of the golden section spread evenly
        return self._runner({**feeds, NOISE: np.asarray(noise, np.float32), SEED: np.asarray(seed, np.float32)})
