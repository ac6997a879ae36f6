"""Rotations besides those of residual streams: within heads, and explicit ones where nothing can be folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.online import Kronecker, turn_input
from qcompiler.graph.sites import Site, find_sites
from qcompiler.passes.transform.hadamard import Floats, even, factors, rotation

Facts = dict[str, dict[str, Any]]
_PRODUCTS = ("MatMul", "Gemm")


def inputs_of_products(model: ir.Model) -> dict[ir.Value, list[Site]]:
    """What products with weights read, each with those sites that read nothing else."""
    found: dict[ir.Value, list[Site]] = {}
    for site in find_sites(model):
        for value in site.activations if all(user.op_type in _PRODUCTS for user in site.users) else ():
            alone = len(site.activations) == 1
            found.setdefault(value, []).extend([site] if alone else [])
    return found


def turn_heads(model: ir.Model, seed: int, done: set[ir.Value]) -> tuple[Facts, dict[ir.Value, int]]:
    """Turn what lies between two linear layers, in attention head by head; the weights on both sides absorb it.

    Source: R2 of SpinQuant (2405.16406), with a random Hadamard matrix; for grouped heads one for all that share keys.

    Args:
        model: whose weights are changed.
        seed: of the signs.
        done: values that turn already; more are added.

    Returns:
        Facts by the name of the value, and for every value that products read how many equal blocks lie side by side.
    """
    facts: Facts = {}
    counts: dict[ir.Value, int] = {}
    for value, fold in head_folds(model, done):
        fold.rotate([rotation(block.shape[1], seed + k) for k, block in enumerate(fold.blocks)])
        heads = sum(len(block) for block in fold.blocks)
        facts[value.name or ""] = {"width": fold.size, "blocks": heads}
        rows = sorted(row.tolist() for block in fold.blocks for row in block)
        if len({len(row) for row in rows}) == 1 and np.array_equal(np.concatenate(rows), np.arange(fold.size)):
            counts[value] = heads
    return facts, counts


def head_folds(model: ir.Model, done: set[ir.Value]) -> Iterator[tuple[ir.Value, Fold]]:
    """Values that products read and that may turn within heads, between weights on both sides, with their folds.

    Args:
        model: that may be changed by a fold before the next one is asked for.
        done: values that turn already; more are added.
    """
    for value in inputs_of_products(model):
        fold = None if value in done else find_fold(model, value, "rotate")
        if isinstance(fold, Fold) and between_weights(fold):
            done |= fold.region.marks.keys()
            yield value, fold


def between_weights(fold: Fold) -> bool:
    """Whether weights absorb a transform on both sides."""
    return all(any(edit.is_weight for edit in side) for side in (fold.writers, fold.readers))


def turn_online(
    model: ir.Model, seed: int, block: int, done: set[ir.Value], heads: Mapping[ir.Value, int]
) -> tuple[Facts, list[Refusal]]:
    """Put explicit matrices before the products that no folded rotation reaches, across heads where those are turned.

    Args:
        model: whose graph is changed.
        seed: of the signs.
        block: order of Hadamard blocks; 0: all channels are mixed.
        done: values that turn already.
        heads: by value the number of blocks within which it turns already.
    """
    facts: Facts = {}
    refused: list[Refusal] = []
    for value, sites in inputs_of_products(model).items():
        if (value in done and value not in heads) or value.const_value is not None:
            continue
        turn = None if not sites else _matrix(sites[0].columns, seed, block, heads.get(value))
        if isinstance(turn, Kronecker):
            turn = turn_input(model, value, sites, turn) or turn
        name = value.name or "?"
        if isinstance(turn, Kronecker):
            facts[name] = {"width": sites[0].columns, "sizes": list(turn.sizes), "sites": [site.name for site in sites]}
        else:
            refused.append(turn or Refusal(name, "the weights that read it read other values too"))
    return facts, refused


def _matrix(width: int, seed: int, block: int, heads: int | None) -> Kronecker | Refusal:
    if heads == 1 or width == 1:
        return Refusal(f"{width} channels", "it is turned already, or has nothing to be mixed")
    if heads is not None:
        return Kronecker((1, heads, width // heads), _signed(heads, seed), None)
    if block and width % block:
        return Refusal(f"{width} channels", f"they are not made of Hadamard blocks of {block}")
    size = block or width
    return kronecker(size, seed, width // size)


def kronecker(width: int, seed: int, blocks: int = 1) -> Kronecker:
    """A random even matrix of two factors; the same for every one of the blocks that lie side by side."""
    a, b = factors(width)
    return Kronecker((blocks, a, b), _signed(a, seed) if a > 1 else None, _signed(b, seed + 1) if b > 1 else None)


def _signed(order: int, seed: int) -> Floats:
    return np.random.default_rng(seed).choice([-1.0, 1.0], (order, 1)) * even(order)
