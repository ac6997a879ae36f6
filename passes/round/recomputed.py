"""A twin in parts whose inner values are computed again in the backward pass instead of being kept (checkpointing).

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016: a forward pass more, and only one part's values at
a time. Only `tuned_twin` imports this file, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint


def recomputed(module: torch.fx.GraphModule, part_of: Mapping[str, int]) -> torch.fx.GraphModule:
    """The same function with the same parameters, cut into parts; all but the last are recomputed.

    Args:
        module: from `fx_twin`, perhaps with modules put in behind values.
        part_of: part by name of a value, from 0 in the order of the graph. What is in none is computed first.
    """
    parts: dict[torch.fx.Node, int] = {}
    for node in module.graph.nodes:
        found = part_of.get(node.meta.get("value", ""))
        if found is None and node.op in ("call_module", "call_function"):
            # what was put in behind a value, and one of several results of a node, are where their source is
            found = max((parts[source] for source in node.all_input_nodes if source in parts), default=-1)
        if found is not None:
            parts[node] = found
    last = max(parts.values(), default=-1)
    split = split_module(module, module, lambda node: parts.get(node, -1) + 1)
    for name, part in list(split.named_children()):
        if name != f"submod_{last + 1}":
            setattr(split, name, _Recomputed(part))
    return split


class _Recomputed(torch.nn.Module):
    """A part that forgets what it computed."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        """Its outputs."""
        if not torch.is_grad_enabled():
            return self.part(*inputs)
        return checkpoint(self.part, *inputs, use_reentrant=False)
