"""Sites: every place of a graph that can be given a number format, found by topology.

A site is an operation with a constant weight. All methods see the weight as a matrix [rows, columns]: rows
are output channels, columns what the product sums over. `Site.to_matrix` and `Site.from_matrix` translate.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import Refusal

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Site:
    """One quantizable weight and the operation that uses it.

    Attributes:
        name: unique and stable: the weight's module path if known, else the node's name.
        op: MatMul, Gemm, Conv, ConvTranspose or Gather.
        node: the operation. A weight shared by several nodes is one site; `node` is the first user,
            `users` are all of them (a tied embedding has a Gather and a MatMul, perhaps through Transpose).
        weight: the value of the weight's initializer.
        activation: the value of the operation's data input, None for Gather.
        shape: shape of the weight tensor.
        rows, columns: of the matrix form.
        layout: how the tensor maps to the matrix:
            "rows-first"  [N, K]          (Gemm transB=1, Gather tables, tied heads)
            "columns-first" [..., K, N]   (MatMul, Gemm transB=0; leading axes are batches of matrices)
            "conv"        [O, I/g, *kernel]     -> [O, I/g * kernel]
            "conv-transpose" [I, O/g, *kernel]  -> [O, I/g * kernel], group by group
        groups: of a convolution, else 1.
        branch: constants of products beside the operation that correct it (`graph.branches`); stored with the site.
    """

    name: str
    op: str
    node: ir.Node
    users: tuple[ir.Node, ...]
    weight: ir.Value
    activation: ir.Value | None
    shape: tuple[int, ...]
    rows: int
    columns: int
    layout: str
    groups: int = 1
    branch: tuple[ir.Value, ...] = ()

    @property
    def branch_bits(self) -> int:
        """Stored bits of the correction beside the weight."""
        return sum(8 * value.const_value.nbytes for value in self.branch if value.const_value is not None)

    @property
    def activations(self) -> tuple[ir.Value, ...]:
        """The data inputs of all users but Gathers, each once: a Gram matrix sums over all of them."""
        inputs = (user.inputs[0] for user in self.users if user.op_type != "Gather")
        return tuple(dict.fromkeys(v for v in inputs if v is not None))

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def to_matrix(self, tensor: Array) -> Array:
        """Weight tensor -> [rows, columns]."""
        if self.layout == "columns-first":
            return np.swapaxes(tensor, -1, -2).reshape(self.rows, self.columns)
        if self.layout == "conv-transpose":
            g, (i, o), kernel = self.groups, self.shape[:2], self.shape[2:]
            return np.swapaxes(tensor.reshape(g, i // g, o, *kernel), 1, 2).reshape(self.rows, self.columns)
        return tensor.reshape(self.rows, self.columns)

    def from_matrix(self, matrix: Array) -> Array:
        """[rows, columns] -> weight tensor."""
        if self.layout == "columns-first":
            *batch, k, n = self.shape
            return np.ascontiguousarray(np.swapaxes(matrix.reshape(*batch, n, k), -1, -2))
        if self.layout == "conv-transpose":
            g, (i, o), kernel = self.groups, self.shape[:2], self.shape[2:]
            split = matrix.reshape(g, o, i // g, *kernel)
            return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(self.shape)
        return matrix.reshape(self.shape)

    def matrix(self) -> npt.NDArray[np.float32]:
        """The weight as float32 [rows, columns], read from its initializer."""
        return np.asarray(self.to_matrix(self.array()), np.float32)

    def array(self) -> Array:
        """The weight as its initializer holds it."""
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy()


BRANCH = "qcompiler.branch"  # metadata of a constant that corrects a site: the name of the site's weight
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def find_sites(model: ir.Model) -> list[Site]:
    """Every site of the main graph, in topological order of the first user.

    Args:
        model: a float model whose nodes are sorted, its weights initializers of the main graph.
    """
    return [found for found in _examine(model.graph) if isinstance(found, Site)]


def skipped_weights(model: ir.Model) -> list[Refusal]:
    """The weights of MatMul, Gemm, Conv, ConvTranspose and Gather that are no sites, each with the reason."""
    return [found for found in _examine(model.graph) if isinstance(found, Refusal)]


@dataclass(frozen=True)
class Use:
    """One use of an initializer: `node.inputs[index]`, seen through Identity, Cast and 2-D Transpose."""

    node: ir.Node
    index: int
    transposed: bool


def weight_uses(value: ir.Value, transposed: bool = False) -> Iterator[Use]:
    """All uses of a constant, following Identity, float Cast and the plain Transpose of a matrix."""
    for node, index in value.uses():
        flip = _is_matrix_transpose(node, value)
        passes = node.domain == "" and (node.op_type in ("Identity", "Cast") or flip)
        if passes and _is_float(node.outputs[0]):
            yield from weight_uses(node.outputs[0], transposed ^ flip)
            if not node.outputs[0].is_graph_output():
                continue
        yield Use(node, index, transposed)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype in FLOATS


def _is_matrix_transpose(node: ir.Node, value: ir.Value) -> bool:
    if node.op_type != "Transpose" or value.shape is None or len(value.shape) != 2:
        return False
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _examine(graph: ir.Graph) -> list[Site | Refusal]:
    order = {node: position for position, node in enumerate(graph)}
    found: list[tuple[int, int, _Candidate | Refusal]] = []
    branches: dict[str, list[ir.Value]] = {}
    for number, value in enumerate(graph.initializers.values()):
        tensor = value.const_value
        if BRANCH in value.metadata_props:
            branches.setdefault(value.metadata_props[BRANCH], []).append(value)
            continue
        if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) < 2 or tensor.size < 2:
            continue
        candidate = _classify(value, order)
        if candidate is not None:
            first = order[candidate.users[0]] if isinstance(candidate, _Candidate) else -1
            found.append((first, number, candidate))
    found.sort(key=lambda item: item[:2])
    names: dict[str, int] = {}
    sites = [c if isinstance(c, Refusal) else _to_site(c, names) for _, _, c in found]
    return [s if isinstance(s, Refusal) else _with_branch(s, branches.get(str(s.weight.name), [])) for s in sites]


@dataclass(frozen=True)
class _Form:
    """How one operation sees the tensor as a matrix; all uses of a weight must agree."""

    layout: str
    groups: int = 1


@dataclass(frozen=True, eq=False)
class _Candidate:
    weight: ir.Value
    users: tuple[ir.Node, ...]
    form: _Form


def _classify(value: ir.Value, order: dict[ir.Node, int]) -> _Candidate | Refusal | None:
    """A site, the reason why a weight is none, or None for constants that are no weights at all."""
    name = value.name or "?"
    forms: set[_Form] = set()
    users: list[ir.Node] = []
    reasons: list[str] = []
    for use in weight_uses(value):
        in_subgraph = f"it is also used in a subgraph, by {_label(use.node)}"
        form = _form(use, value) if use.node in order else in_subgraph
        if isinstance(form, _Form):
            forms.add(form)
            users.append(use.node)
        else:
            reasons.append(form)
    weighty = bool(users) or any(_takes_weight(use) for use in weight_uses(value))
    if not weighty:
        return None
    if value.is_graph_output():
        reasons.append("it is also an output of the graph")
    if len(forms) > 1:
        reasons.append("its users see it as different matrices")
    if reasons:
        return Refusal(name, reasons[0])
    return _Candidate(value, tuple(sorted(dict.fromkeys(users), key=order.__getitem__)), forms.pop())


_WEIGHT_INPUT = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,), "ConvTranspose": (1,), "Gather": (0,)}


def _takes_weight(use: Use) -> bool:
    return use.node.domain == "" and use.index in _WEIGHT_INPUT.get(use.node.op_type, ())


def _form(use: Use, value: ir.Value) -> _Form | str:
    """How `use` sees the weight, or the reason why it cannot be a site's weight."""
    node, rank = use.node, len(value.shape or ())
    if not _takes_weight(use):
        return f"it is also used by {_label(node)}"
    if node.op_type in ("MatMul", "Gemm"):
        return _product_form(use)
    if node.op_type == "Gather":
        if _int(node, "axis", 0) != 0 or use.transposed:
            return f"{_label(node)} does not gather along axis 0"
        return _Form("rows-first")
    if use.transposed or rank < 3:
        return f"{_label(node)} reads a weight that is not stored as a convolution kernel"
    return _Form("conv" if node.op_type == "Conv" else "conv-transpose", _int(node, "group", 1))


def _product_form(use: Use) -> _Form | str:
    node = use.node
    if use.index == 0:
        return f"it is the left operand of {_label(node)}"
    if node.op_type == "Gemm" and _int(node, "transA", 0):
        return f"{_label(node)} transposes its data"
    flipped = use.transposed ^ bool(node.op_type == "Gemm" and _int(node, "transB", 0))
    return _Form("rows-first" if flipped else "columns-first")


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name or node.outputs[0].name}'"


def _to_site(candidate: _Candidate, names: dict[str, int]) -> Site:
    node, form, weight = candidate.users[0], candidate.form, candidate.weight
    assert weight.const_value is not None
    shape = tuple(int(d) for d in weight.const_value.shape)  # type: ignore[arg-type]
    if form.layout == "columns-first":
        rows, columns = prod(shape[:-2]) * shape[-1], shape[-2]
    elif form.layout == "conv-transpose":
        rows, columns = form.groups * shape[1], shape[0] // form.groups * prod(shape[2:])
    else:
        rows, columns = shape[0], prod(shape[1:])
    base = _base_name(weight, node)
    names[base] = names.get(base, 0) + 1
    name = base if names[base] == 1 else f"{base}#{names[base]}"
    activation = None if node.op_type == "Gather" else node.inputs[0]
    return Site(
        name,
        node.op_type,
        node,
        candidate.users,
        weight,
        activation,
        shape,
        rows,
        columns,
        form.layout,
        form.groups,
    )


def _with_branch(site: Site, constants: list[ir.Value]) -> Site:
    return replace(site, branch=tuple(constants)) if constants else site


def _base_name(weight: ir.Value, node: ir.Node) -> str:
    """The module path ("layers.0.fc1") from weight name or exporter scopes, else the name of the node."""
    name = weight.name or ""
    for ending in (".weight", "/weight", "/kernel"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return _module_path(node) or node.name or name


def _module_path(node: ir.Node) -> str:
    """What torch.onnx writes: "['', 'layers.0', 'layers.0.fc1', 'linear']"; empty if there is none."""
    try:
        scopes = cast(object, ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")))
    except (ValueError, SyntaxError):
        return ""
    path = cast(list[object], scopes)[-2:-1] if isinstance(scopes, list) else []
    return str(path[0]) if path else ""
