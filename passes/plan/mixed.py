"""Groups of two widths as options of allocation: a pair of widths with several shares of promoted groups.

Every promoted group of a pair costs the same number of bits, and a site promotes those that save most first. Shares at
equal slope over all sites are thus one threshold over the groups of the whole model, which is how FGMP chooses, to the
resolution of the shares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from qcompiler.errors import BadOption, Refusal
from qcompiler.formats import PerGroup, PerTensor, Promoted, parse_format
from qcompiler.graph.sites import Site
from qcompiler.plan import SitePlan
from qcompiler.target import Backend

SHARES = (2, 5, 10, 20, 40)  # percent of the groups
_PAIR = re.compile(r"int\d+to\d+", re.ASCII)


def parse_mixed(texts: Sequence[str]) -> tuple[Promoted, ...]:
    """The formats that are meant: "int4to8p10" is one, "int4to8" the pair with every share of `SHARES`.

    Raises:
        BadOption: a text that names no format of two widths.
    """
    found: dict[Promoted, None] = {}
    for text in texts:
        for name in [f"{text}p{share}" for share in SHARES] if _PAIR.fullmatch(text) else [text]:
            fmt = parse_format(name)
            if not isinstance(fmt, Promoted):
                raise BadOption(f"'{text}' has one width", "mixed_blocks", "write a pair such as int4to8 or int4to8p10")
            found[fmt] = None
    return tuple(found)


def mixed_plans(
    backend: Backend, site: Site, offered: Sequence[SitePlan], mixed: Sequence[Promoted]
) -> tuple[list[SitePlan], tuple[Refusal, ...]]:
    """The formats of two widths that a target takes, with groups and activations as in the plans that it offered.

    Where it offered no groups, rows are promoted. What is refused is told if nothing can be had.
    """
    weights = [plan.weight for plan in offered if plan.weight is not None]
    grouped = any(isinstance(spec.granularity, PerGroup) for spec in weights)
    plans: dict[SitePlan, None] = {}
    for plan in offered:
        if plan.weight is None or isinstance(plan.weight.granularity, PerTensor):
            continue
        if grouped and not isinstance(plan.weight.granularity, PerGroup):
            continue
        specs = (replace(plan.weight, format=fmt) for fmt in mixed)
        plans |= dict.fromkeys(replace(plan, weight=spec) for spec in specs)
    reasons = {plan: backend.supports(site, plan) for plan in plans}
    usable = [plan for plan, reason in reasons.items() if reason is None]
    if usable or not plans:
        return usable, ()
    return [], (Refusal(site.name, f"no groups of two widths: {next(iter(reasons.values()))}"),)
