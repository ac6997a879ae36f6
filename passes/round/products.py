"""Products that GPTQ rounds as one: which they are, and their matrices and inputs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.formats import QTensor
from qcompiler.formats.base import Floats
from qcompiler.graph.sites import Site
from qcompiler.measure.segments import Segment
from qcompiler.model import Model
from qcompiler.passes.round.rows import block_count, input_rows

Array = npt.NDArray[Any]
Product = tuple[Site, ...]  # sites whose products are added up: their matrices side by side are one matrix


def by_input(segment: Segment, model: Model, sums: Sequence[Product]) -> list[list[Product]]:
    """The segment's planned sites, those that are added up as one; products of the same inputs are together."""
    planned = [site for site in segment.sites if _planned(model, site)]
    here = {site.node: site for site in planned}
    products: dict[ir.Node, Product] = {site.node: (site,) for site in planned}
    for added in sums:
        mine = tuple(here[site.node] for site in added if site.node in here)
        products |= {site.node: mine for site in mine}
    groups: dict[object, list[Product]] = {}
    for product in dict.fromkeys(products.values()):
        first = product[0]
        plain = first.op in ("MatMul", "Gemm") and block_count(first) == 1
        plans = (model.plan.sites[site.name] for site in product)
        rows = tuple((p.activation, p.activation_bits, p.activation_clip) for p in plans)
        like = (tuple(site.activations for site in product), rows, first.layout) if plain else first
        groups.setdefault(like if first.activation is not None else None, []).append(product)
    return list(groups.values())


def _planned(model: Model, site: Site) -> bool:
    plan = model.plan.sites.get(site.name)
    return plan is not None and plan.weight is not None


def noise(product: Product, finer: Sequence[int]) -> Floats:
    """The power of the rounding error of each column, [columns], by how many bits finer it is than the coarsest."""
    return np.repeat(np.exp2(-2.0 * np.asarray(finer)).astype(np.float32), [site.columns for site in product])


def places(product: Product) -> list[slice]:
    """Where each site's columns lie in the matrices side by side."""
    ends = np.cumsum([0, *(site.columns for site in product)]).tolist()
    return [slice(low, high) for low, high in pairwise(ends)]


def decoded(panels: Sequence[QTensor]) -> Floats:
    """The matrix that panels side by side stand for, float32 [rows, columns]."""
    return np.concatenate([panel.decode() for panel in panels], 1)


def rows_of(
    product: Product, users: Sequence[ir.Node], inputs: Sequence[Array], limit: int, rng: np.random.Generator
) -> Floats:
    """What these users of all sites read, side by side, the same positions of all: float32 [blocks, rows, columns]."""
    state = rng.bit_generator.state
    parts: list[Floats] = []
    for site, user, x in zip(product, users, inputs, strict=True):
        rng.bit_generator.state = state
        parts.append(input_rows(site, x, limit, rng, user).transpose(1, 0, 2))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 2)
