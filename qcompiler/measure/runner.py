"""Running a graph, or a part of it, on ONNX Runtime, exactly as the graph says and without copying its weights.

*Exact*: ONNX Runtime likes to replace DequantizeLinear and MatMul by kernels that round activations to int8.
Here quantized weights are folded to floats instead and QuantizeLinear on activations stays what it is, so the
result is that of the graph's own semantics, up to the order of summation in float32.

*Without copies*: the large matrices of products and embeddings become inputs of the session, fed at each run
straight from the (memory-mapped) array; MatMul is as fast that way (measured: within 3% on 512 tokens). What
convolutions read stays constant, because ONNX Runtime re-orders it once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.errors import BadData, BadModel
from qcompiler.measure.decode import decode_constants
from qcompiler.measure.in_place import open_in_place, shape_of
from qcompiler.measure.memory import Growth
from qcompiler.scratch import forgetting

Array = npt.NDArray[Any]
_GROWTH = Growth()
_FED_BYTES = 1 << 18  # a matrix from this size on is fed, not stored in the session
_LARGE = 1 << 30  # bytes that are fed in one run
_MOMENT = 0.2  # seconds: a product of a large matrix with many rows takes longer, and finds its pages in the cache
_FED_BY = frozenset({"MatMul", "Gemm", "Gather", "Transpose"})
_ADVICE = {  # what ORT says of a model that it cannot run -> what to do
    "is not a registered function/op": "a model can be compiled if ONNX Runtime has all of its operations",
    "No Op registered": "a model can be compiled if ONNX Runtime has all of its operations",
    "Could not find an implementation": "ONNX Runtime lacks this operation in the model's type: convert it to float32",
}
_REPAIR = "see that ONNX Runtime runs the original, and export it again if not"


class Runner:
    """A session of a model, or of the sub-graph between given values. Threads may share it.

        >>> runner = Runner(model.ir, outputs=["hidden", "logits"])          # doctest: +SKIP
        >>> runner({"images": images})["hidden"].shape                       # doctest: +SKIP
        (8, 32, 14, 14)

    Args:
        model: any valid model; it is not changed, and its tensors are used in place.
        outputs: values to return, intermediate ones too; the model's outputs if None.
        inputs: values to feed; the model's inputs if None. Initializers may be named here or in `replaceable`.
        replaceable: initializers that a call may replace; they keep their own value where a call does not.
        threads: of ONNX Runtime; all that the process may use if None.
        dtypes: element types of the inputs for which the graph does not say it.

    Raises:
        BadModel: ONNX Runtime cannot run the graph; the message holds its reason, which names the node.
        ValueError: a name that the graph does not have, or inputs that do not determine the outputs.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        outputs: Sequence[str] | None = None,
        inputs: Sequence[str] | None = None,
        replaceable: Collection[str] = (),
        threads: int | None = None,
        dtypes: Mapping[str, np.dtype[Any]] | None = None,
    ) -> None:
        graph = model.graph
        wanted = list(dict.fromkeys(outputs if outputs is not None else [_name(v) for v in graph.outputs]))
        fed = list(dict.fromkeys(inputs if inputs is not None else _own_inputs(graph)))
        self.outputs: tuple[str, ...] = tuple(wanted)
        self._echo = [name for name in wanted if name in fed]
        self._computed = [name for name in wanted if name not in fed]
        self._defaults: dict[str, Array] = {}
        self._session: ort.InferenceSession | None = None
        self.inputs: tuple[str, ...] = tuple(self._echo)
        if self._computed:
            part = _extract(model, fed, self._computed, replaceable)
            where = str(model.meta.get("file") or graph.name or "model")
            self._open(part, fed, set(replaceable), threads, dtypes or {}, where)

    @property
    def replaceable(self) -> frozenset[str]:
        """The initializers that a call may replace: those asked for and all others that are fed."""
        return frozenset(self._defaults)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch.

        Args:
            feeds: an array for each of `inputs`, and any of `replaceable` (cast to the type of what it replaces);
                other names are ignored.

        Returns:
            An array for each of `outputs`.

        Raises:
            BadData: an input is missing, or the graph cannot take the arrays.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise BadData(f"no input '{missing[0]}'", fix=f"the graph needs {', '.join(self.inputs)}")
        results = {name: np.asarray(feeds[name]) for name in self._echo}
        if self._session is not None:
            given = {name: feeds[name] for name in self.inputs if name not in self._unused}
            weights = {
                name: np.asarray(feeds[name]).astype(own.dtype, copy=False) if name in feeds else own
                for name, own in self._defaults.items()
            }
            arrays = {name: np.asarray(a, order="C") for name, a in (given | weights).items()}
            try:
                with self._letting_go(arrays.values()):
                    values: Sequence[Any] = self._session.run(self._computed, arrays)
            except Exception as error:  # ORT raises a dozen classes of its own that share no base
                raise BadData(f"the graph cannot take this input ({_reason(error)})") from error
            results.update(zip(self._computed, values, strict=True))
            _GROWTH.check()
        return {name: results[name] for name in self.outputs}

    def _letting_go(self, arrays: Collection[Array]) -> AbstractContextManager[None]:
        """Each weight is read once a run: of a large model not all need be in memory at a time."""
        large = sum(array.nbytes for array in arrays) >= _LARGE
        return forgetting(_MOMENT, arrays) if large else nullcontext()

    def _open(
        self,
        part: ir.Model,
        fed: list[str],
        replaceable: set[str],
        threads: int | None,
        dtypes: Mapping[str, np.dtype[Any]],
        where: str,
    ) -> None:
        graph = part.graph
        for value in graph.inputs:
            if value.dtype is None and _name(value) in dtypes:
                value.type = ir.TensorType(ir.DataType.from_numpy(dtypes[_name(value)]))
        try:
            self._feed(graph, replaceable - set(fed))
            decode_constants(part, dequantize=True)  # what may be replaced is no constant any more
            self._feed(graph, {name for name, value in graph.initializers.items() if _is_fed(value)} - set(fed))
            self._session, self._keep = open_in_place(part, _options(threads))
        except Exception as error:  # as above
            fix = next((fix for words, fix in _ADVICE.items() if words in str(error)), _REPAIR)
            raise BadModel(f"ONNX Runtime cannot run it ({_reason(error)})", where, fix) from error
        self.inputs = tuple(dict.fromkeys([*fed, *self._echo]))
        self._unused = set(fed) - {_name(v) for v in graph.inputs}

    def _feed(self, graph: ir.Graph, names: Collection[str]) -> None:
        """Make initializers inputs, whose value is given with every call."""
        for name in names:
            value = graph.initializers.get(name)
            if value is not None and value.const_value is not None:
                self._defaults[name] = _make_input(graph, value, value.const_value)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _own_inputs(graph: ir.Graph) -> list[str]:
    """The inputs that a user feeds; before IR 4 initializers were listed among the inputs too."""
    return [_name(v) for v in graph.inputs if v.name not in graph.initializers]


def _extract(model: ir.Model, inputs: list[str], outputs: list[str], replaceable: Collection[str]) -> ir.Model:
    """A copy of the sub-graph between two sets of values, tensors shared."""
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    unused = [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]
    for value in unused:
        graph.inputs.remove(value)
    for name in set(inputs) & set(graph.initializers):  # fed instead
        value = graph.initializers.pop(name)
        if value.const_value is not None:
            value.type, value.shape = ir.TensorType(value.const_value.dtype), shape_of(value.const_value)
            value.const_value = None
    unknown = [name for name in replaceable if name not in model.graph.initializers]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not an initializer")
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _is_fed(value: ir.Value) -> bool:
    """Whether a weight is better fed than stored: a large array that only products and look-ups read."""
    tensor = value.const_value
    if tensor is None:
        return False
    plain = tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    large = plain and len(tensor.shape) >= 2 and tensor.nbytes >= _FED_BYTES
    if not large or value.is_graph_output():
        return False
    return all(node.domain == "" and node.op_type in _FED_BY for node in value.consumers())


def _make_input(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> Array:
    del graph.initializers[_name(value)]
    value.const_value = None
    value.type, value.shape = ir.TensorType(tensor.dtype), shape_of(tensor)
    if value not in graph.inputs:
        graph.inputs.append(value)
    return tensor.numpy()


def _options(threads: int | None) -> Any:
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 4  # errors come as exceptions; ORT would print them to stderr as well
    options.enable_cpu_mem_arena = False  # dozens of sessions live at once, each would keep its peak
    for key, value in {
        "session.disable_quant_qdq": "1",
        "session.disable_double_qdq_remover": "1",
        "session.qdq_matmulnbits_accuracy_level": "0",
        "session.disable_prepacking": "1",  # a second copy of every matrix, for no gain at batch sizes
        "session.intra_op.allow_spinning": "0",
    }.items():
        options.add_session_config_entry(key, value)
    return options


def _reason(error: Exception) -> str:
    """ORT's message without its "[ONNXRuntimeError] : 1 : FAIL : " and without line breaks."""
    text = " ".join(str(error).split())
    parts = text.split(" : ", 3)
    return (parts[3] if text.startswith("[ONNXRuntimeError]") and len(parts) == 4 else text)[:400]
