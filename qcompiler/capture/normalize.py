"""One normal form for all captured graphs, made by the passes of onnx_ir and onnxscript.

Opset 21 or later, functions inlined, constants folded and lifted to initializers, BatchNormalization folded
into the product before it, Identity and Dropout gone, shapes inferred, dead code removed, unique names, no
metadata but module paths. The function that the graph computes is the same.
"""

from __future__ import annotations

import ast
import logging
import math
import re
from collections.abc import Generator
from contextlib import contextmanager

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter, version_converter
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from qcompiler.capture.padding import explicit_padding
from qcompiler.errors import BadModel, QcompilerError

OPSET = 21
MODULE_KEY = "qcompiler.module"
DEFAULTS_KEY = "defaults"  # of a graph's meta: inputs that had a default value, which is a constant now
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_FOLD_LIMIT = 1 << 18  # elements of a folded constant; larger ones only if they replace as much
_SLIM_LIMIT = 1 << 16  # bytes; larger initializers do not pass through onnx's converter
_BATCHNORM = (fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule)
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0}
# Layout and type changes of one weight are folded at any size: a product needs its weight as a constant.
_RELAYOUT = ("Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_NO_MODULE = "_empty_nn_module_stack"  # what torch writes for operations of its own
_SCOPED_NAME = re.compile(r"/(.+)/[^/]+")


def normalize(model: ir.Model, where: str = "model") -> ir.Model:
    """The normal form of a model; the argument is changed and may be returned.

    Raises:
        BadModel: the graph has a circle or an invalid operation, or no converter can bring it to opset 21.
    """
    try:
        model.graph.sort()
    except ValueError as error:
        raise BadModel("nodes need each other's outputs in a circle", where) from error
    try:
        with _no_logging_to_stderr():
            return _normalized(model, where)
    except QcompilerError:
        raise
    except Exception as error:  # the passes trust operators to have their inputs and attributes
        raise BadModel(f"holds an invalid operation or type ({root_cause(error)})", where) from error


@contextmanager
def _no_logging_to_stderr() -> Generator[None]:
    """Keep what the libraries log of steps that they skip from stderr, where Python prints it if nobody listens."""
    nowhere, loggers = logging.NullHandler(), [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    for logger in loggers:
        logger.addHandler(nowhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(nowhere)


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _normalized(model: ir.Model, where: str) -> ir.Model:
    _fix_defaults(model)
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model = _uplift(model, where)
    _simplify(model)
    explicit_padding(model)
    _keep_module_paths(model)
    _name_weights(model)
    model.metadata_props.clear()
    model.ir_version = min(max(model.ir_version, 10), 13)
    return model


def _fix_defaults(model: ir.Model) -> None:
    """Make constants of inputs that have a default value; before IR 4 every weight was listed as such an input."""
    if model.ir_version >= 4:
        model.meta[DEFAULTS_KEY] = [str(value.name) for value in model.graph.inputs if value.is_initializer()]
    common.RemoveInitializersFromInputsPass()(model)


def _uplift(model: ir.Model, where: str) -> ir.Model:
    """Opset 21 or later. Below 18 by onnx's own converter, from there on by onnxscript's."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    try:
        if version < 18:
            model = _convert_with_onnx(model, 18)
        if version < OPSET:
            version_converter.convert_version(model, OPSET)
    except Exception as error:  # both converters raise whatever they like
        _refuse_unknown(model, where)
        reason = root_cause(error)
        fix = "export the model with opset 18 or later"
        raise BadModel(f"cannot be converted from opset {version} to {OPSET} ({reason})", where, fix) from error
    return model


def _refuse_unknown(model: ir.Model, where: str) -> None:
    """Name the first operator that claims to be one of ONNX and is none."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            label = node.name or node.outputs[0].name
            what = f"node '{label}' has the operator '{node.op_type}', which no version of ONNX has"
            raise BadModel(what, where, "export the model with operators of ONNX, or name the operator's own domain")


def _convert_with_onnx(model: ir.Model, target: int) -> ir.Model:
    """The C++ converter of the onnx package; large initializers become inputs, so that any model fits a protobuf."""
    weights: dict[str, ir.TensorProtocol] = {}
    graph, count = model.graph, len(model.graph.inputs)
    _bring_inside(model)
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SLIM_LIMIT:
            weights[name] = tensor
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), target))
    for value in list(converted.graph.inputs)[count:]:
        converted.graph.inputs.remove(value)
        value.const_value = weights[str(value.name)]
        converted.graph.register_initializer(value)
    converted.meta.update(model.meta)
    return converted


def _bring_inside(model: ir.Model) -> None:
    """Read what lies in files into memory, except the large weights of the main graph."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            large = graph is model.graph and tensor is not None and tensor.nbytes > _SLIM_LIMIT
            if isinstance(tensor, ir.ExternalTensor) and not large:
                value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)


def _simplify(model: ir.Model) -> None:
    inputs = [str(value.name) for value in model.graph.inputs]
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.ShapeInferencePass(check_type=False, strict_mode=False),
    )(model)
    for _ in range(2):  # what is folded first makes more constant
        optimizer.fold_constants(
            model, onnx_shape_inference=True, output_size_limit=_FOLD_LIMIT, should_fold=_should_fold
        )
        rewriter.RewritePass(_BATCHNORM)(model)
        common.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
    )(model)
    _give_inputs_their_names(model, inputs)
    _give_subgraphs_their_outputs(model)
    ir.passes.Sequential(
        common.NameFixPass(),
        common.ShapeInferencePass(check_type=False, strict_mode=False),
    )(model)


def _give_inputs_their_names(model: ir.Model, names: list[str]) -> None:
    """Let an input be an output again, as runtimes take it: the Identity between them would need the input's name."""
    graph = model.graph
    for value, name in zip(graph.inputs, names, strict=True):
        if value.name != name:
            index = next(i for i, output in enumerate(graph.outputs) if output.name == name)
            identity = graph.outputs[index].producer()
            assert identity is not None
            graph.outputs[index] = value
            graph.remove(identity, safe=True)
            value.name = name


def _give_subgraphs_their_outputs(model: ir.Model) -> None:
    """Put back the Identity by which a branch returns a value from outside: removing it is invalid there."""
    for graph in model.graphs():
        if graph is model.graph:
            continue
        for index, value in enumerate(graph.outputs):
            producer = value.producer()
            if (producer is None or producer.graph is not graph) and not value.is_initializer():
                copy = ir.node("Identity", [value])
                copy.outputs[0].name = f"{value.name}_returned"
                copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
                graph.append(copy)
                graph.outputs[index] = copy.outputs[0]


def _should_fold(node: ir.Node) -> bool | None:
    """Whether to fold a node whose inputs are constant: never into something huge (None: the default rules)."""
    sizes = [math.prod(v.const_value.shape.numpy()) for v in node.inputs if v is not None and v.const_value is not None]
    shape = node.outputs[0].shape
    if shape is None or not shape.is_static():
        return False
    result = math.prod(shape.numpy())
    if result > max(_FOLD_LIMIT, sum(sizes)):
        return False
    weight = node.inputs[0] if node.inputs else None
    if node.op_type in _RELAYOUT and node.domain == "" and weight is not None and len(weight.uses()) == 1:
        return True
    return None


def _keep_module_paths(model: ir.Model) -> None:
    """Keep the path of the module that a node came from, and drop all other metadata (it names local files)."""
    paths = {node: module_path(node) for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    common.ClearMetadataAndDocStringPass()(model)
    for node, path in paths.items():
        if path:
            node.metadata_props[MODULE_KEY] = path


def module_path(node: ir.Node) -> str:
    """The dotted path of the torch module that a node came from, or "" where nothing tells it."""
    if known := node.metadata_props.get(MODULE_KEY):
        return known
    if text := node.metadata_props.get(_SCOPES_KEY):
        try:
            scopes = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return ""
        path = str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
        return "" if path.startswith(_NO_MODULE) else path
    scoped = _SCOPED_NAME.fullmatch(node.name or "")  # the older exporter names nodes "/layer.0/query/MatMul"
    return scoped[1].replace("/", ".") if scoped else ""


def _name_weights(model: ir.Model) -> None:
    """Name weights that the exporter left anonymous (no "." in the name) after their module."""
    taken = {v.name for n in model.graph for v in n.outputs} | set(model.graph.initializers)
    for node in model.graph:
        index, path = _WEIGHT_INPUT.get(node.op_type), node.metadata_props.get(MODULE_KEY, "")
        if index is None or not path or len(node.inputs) <= index:
            continue
        weight, name = node.inputs[index], f"{path}.weight"
        if weight is None or not weight.is_initializer() or weight.graph is not model.graph or name in taken:
            continue
        tensor = weight.const_value
        if tensor is not None and len(tensor.shape) > 1 and "." not in str(weight.name):
            weight.name = name
            taken.add(name)
