"""Rules of fused attention and of rotary embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.folds.labels import Labels, Unfit
from qcompiler.graph.folds.region import Mark, Region, dims, label


def attention(region: Region, node: ir.Node) -> None:
    """Attention (opset 23) and GroupQueryAttention: values to output, queries against keys.

    A key or value head serves several query heads: their labels are one.
    """
    if region.kind == "shift" or (region.kind == "permute" and node.op_type != "Attention"):
        region.pin_node(node, f"a {region.kind} cannot cross {label(node)}")
        return
    if _cached(node):
        region.pin_node(node, f"{label(node)} reads or writes a cache of keys and values")
        return
    heads = _heads(node)
    value, out = region.get(node.inputs[2]), region.get(node.outputs[0])
    if value is not None or out is not None:
        _tie_heads(region, node, (2, value), (-1, out), heads, 1)
    query, key = region.get(node.inputs[0]), region.get(node.inputs[1])
    if region.kind == "rotate" and (query or key):
        for mark in (query, key):
            region.pin(mark.labels, f"a rotate cannot cross {label(node)}") if mark is not None else None
        return
    if query is not None or key is not None:
        _tie_heads(region, node, (1, key), (0, query), heads, -1)
        if node.attributes.get("do_rotary") is not None and node.attributes["do_rotary"].as_int():
            mark = region.get(node.inputs[0])
            assert mark is not None
            _rotary_ties(region, _split(mark.labels, heads[0]), _flag(node, "rotary_interleaved"), 0)


def _cached(node: ir.Node) -> bool:
    past = (4, 5) if node.op_type == "Attention" else (3, 4)
    given = any(k < len(node.inputs) and node.inputs[k] is not None for k in past)
    return given or any(v.uses() or v.is_graph_output() for v in node.outputs[1:3])


def _heads(node: ir.Node) -> tuple[int, int]:
    """Numbers of query heads and of key-value heads."""
    names = ("q_num_heads", "kv_num_heads") if node.op_type == "Attention" else ("num_heads", "kv_num_heads")
    if node.inputs[1] is None or node.inputs[2] is None:
        raise Unfit(f"{label(node)} takes packed queries, keys and values")
    query, key = node.inputs[0], node.inputs[1]
    assert query is not None
    if len(dims(query)) == 4:
        found = [dims(query)[1], dims(key)[1]]
        if not isinstance(found[0], int) or not isinstance(found[1], int):
            raise Unfit(f"the number of heads of {label(node)} is unknown")
        return found[0], found[1]
    given = [node.attributes[name].as_int() for name in names if name in node.attributes]
    if len(given) != 2:
        raise Unfit(f"the number of heads of {label(node)} is unknown")
    return given[0], given[1]


def _split(labels: Labels, heads: int) -> Labels:
    """[1, 1, heads * d] or [1, heads, 1, d] -> [heads or 1, d or 1]."""
    if labels.ndim == 4:
        return labels[0, :, 0, :]
    flat = labels.reshape(-1)
    return flat.reshape(1, 1) if flat.size == 1 else flat.reshape(heads, -1)


def _join(split: Labels, rank: int) -> Labels:
    return split[None, :, None, :] if rank == 4 else split.reshape(1, 1, -1)


def _tie_heads(
    region: Region,
    node: ir.Node,
    kv: tuple[int, Mark | None],
    query: tuple[int, Mark | None],
    heads: tuple[int, int],
    relation: int,
) -> None:
    """Make the labels of a key-value operand those of all query heads that it serves."""
    (kv_index, kv_mark), (q_index, q_mark) = kv, query
    served = heads[0] // heads[1]
    if kv_mark is None:
        assert q_mark is not None
        split = _split(region.classes.only(q_mark.labels, _channel_axes(q_mark.labels)), heads[0])
        if split.shape[0] > 1:
            grouped = split.reshape(heads[1], served, -1)
            region.classes.tie(grouped, grouped[:, :1])
            split = grouped[:, 0]
        elif q_mark.labels.ndim == 3:
            split = np.broadcast_to(split, (heads[1], split.shape[1]))
        region.put(node, kv_index, _join(split, q_mark.labels.ndim), relation * q_mark.sign, "kv")
        return
    split = _split(region.classes.only(kv_mark.labels, _channel_axes(kv_mark.labels)), heads[1])
    if split.shape[0] > 1 or kv_mark.labels.ndim == 3:
        split = np.repeat(np.broadcast_to(split, (heads[1], split.shape[1])), served, axis=0)
    if split.shape[1] == 1 and kv_mark.labels.ndim == 3:
        split = split[:1]
    labels = _join(split, kv_mark.labels.ndim)
    if region.kind in ("permute", "rotate"):
        ids = np.arange(split.shape[0])[:, None]
        region.blocks.append((split, np.broadcast_to(ids, split.shape)))
    if q_index < 0:
        region.mark(node.outputs[0], labels, relation * kv_mark.sign)
    else:
        region.put(node, q_index, labels, relation * kv_mark.sign, "query")


def _channel_axes(labels: Labels) -> tuple[int, ...]:
    return (1, 3) if labels.ndim == 4 else (2,)


def rotary(region: Region, node: ir.Node) -> None:
    """RotaryEmbedding: the two channels of a pair turn together, so they share a scale."""
    if region.kind != "scale":
        region.pin_node(node, f"a {region.kind} cannot cross {label(node)}")
        return
    mark = region.get(node.outputs[0]) or region.get(node.inputs[0])
    assert mark is not None
    region.mark(node.outputs[0], mark.labels, mark.sign)
    region.put(node, 0, mark.labels, mark.sign, "data")
    heads = 1
    if mark.labels.ndim == 3:
        heads = _flag(node, "num_heads")
        if heads == 0:
            raise Unfit(f"the number of heads of {label(node)} is unknown")
    _rotary_ties(region, _split(mark.labels, heads), _flag(node, "interleaved"), _flag(node, "rotary_embedding_dim"))


def _flag(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _rotary_ties(region: Region, split: Labels, interleaved: int, turned: int) -> None:
    turned = turned or split.shape[-1]
    part = split[:, :turned]
    if part.shape[1] < 2:
        return
    first, second = (part[:, 0::2], part[:, 1::2]) if interleaved else (part[:, : turned // 2], part[:, turned // 2 :])
    region.classes.tie(first, second)
