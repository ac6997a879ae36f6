"""Convolutions whose padding is written as `auto_pad` get it in numbers, wherever it does not depend on the input."""

from __future__ import annotations

import onnx_ir as ir

_AUTOMATIC = ("SAME_UPPER", "SAME_LOWER", "VALID")


def explicit_padding(model: ir.Model) -> int:
    """Replace `auto_pad` of Conv by `pads` in place; return how many nodes were changed.

    With stride 1 "SAME" pads by dilation * (kernel - 1) whatever the input is; with other strides its size must be
    known. All other nodes stay as they are.
    """
    changed = 0
    for node in model.graph:
        if node.op_type != "Conv" or node.domain or node.attributes.get_string("auto_pad", "NOTSET") not in _AUTOMATIC:
            continue
        pads = _pads(node)
        if pads is not None:
            del node.attributes["auto_pad"]
            node.attributes["pads"] = ir.AttrInt64s("pads", pads)
            changed += 1
    return changed


def _pads(node: ir.Node) -> list[int] | None:
    """Of every spatial axis at its begin, then of every one at its end."""
    data, weight = node.inputs[0], node.inputs[1]
    if weight is None or weight.shape is None or not weight.shape.is_static():
        return None
    kernel = [int(d) for d in weight.shape.numpy()[2:]]
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * 2 * len(kernel)
    strides = _ints(node, "strides", len(kernel))
    dilations = _ints(node, "dilations", len(kernel))
    sizes = [None] * len(kernel) if data is None or data.shape is None else list(data.shape)[2:]
    totals: list[int] = []
    for k, stride, dilation, size in zip(kernel, strides, dilations, sizes, strict=True):
        reach = dilation * (k - 1) + 1
        if stride == 1:
            totals.append(reach - 1)
        elif isinstance(size, int):
            totals.append(max(0, (-(-size // stride) - 1) * stride + reach - size))
        else:
            return None
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*less, *more] if mode == "SAME_UPPER" else [*more, *less]


def _ints(node: ir.Node, name: str, count: int) -> list[int]:
    attribute = node.attributes.get(name)
    return [1] * count if attribute is None else list(attribute.as_ints())
