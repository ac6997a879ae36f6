"""Budgets as the user writes them, and the exact count of what a plan stores.

*Bits* are the average number of stored bits per weight over all sites, each shared weight once: codes, scales
and zero points, packed as they lie in the file; a weight that stays float because nothing else is possible
counts the bits of its dtype. Embeddings are sites as any other. Sites that the user keeps (`--keep PATTERN`)
stay float and are outside this average.

*Bytes* are everything that is stored: planned and kept weights, and all other constants of the graph (biases,
norms, shapes). Kept sites are inside.

*Seconds* ("8ms") are the measured latency of one run of the artifact on this machine, of one sample, or of four at
once for "8ms@4".

*BOPs* ("1.2Gbops") are the bit operations of one sample, see `qcompiler.measure.bops` for the convention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal

import onnx_ir as ir

from qcompiler.errors import BadOption
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.plan import Plan, SitePlan

Kind = Literal["bits", "bytes", "seconds", "bops"]
_UNITS: dict[str, tuple[Kind, int | Fraction]] = {
    **dict.fromkeys(("bits", "bit"), ("bits", 1)),
    **dict.fromkeys(("bytes", "B"), ("bytes", 1)),
    **dict.fromkeys(("kB", "KB", "kb"), ("bytes", 10**3)),
    **dict.fromkeys(("MB", "mb"), ("bytes", 10**6)),
    **dict.fromkeys(("GB", "gb"), ("bytes", 10**9)),
    "KiB": ("bytes", 2**10),
    "MiB": ("bytes", 2**20),
    "GiB": ("bytes", 2**30),
    "s": ("seconds", 1),
    "ms": ("seconds", Fraction(1, 10**3)),
    "us": ("seconds", Fraction(1, 10**6)),
    **dict.fromkeys(("bops", "BOPs", "BOPS"), ("bops", 1)),
    **dict.fromkeys(("kbops", "kBOPs", "Kbops"), ("bops", 10**3)),
    **dict.fromkeys(("Mbops", "MBOPs", "MBOPS"), ("bops", 10**6)),
    **dict.fromkeys(("Gbops", "GBOPs", "GBOPS"), ("bops", 10**9)),
    **dict.fromkeys(("Tbops", "TBOPs", "TBOPS"), ("bops", 10**12)),
}
GRID_BYTES = 5  # of a static activation: a float32 scale and a uint8 zero point
_NUMBER = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?|[+-]?nan|[+-]?inf)\s*([A-Za-z@]*.*?)\s*", re.ASCII
)
_BATCH = re.compile(r"[1-9][0-9]{0,5}")
_HOW = "write bits per weight (3.5bits), a size (120MB, 120MiB), a latency (8ms) or bit operations (1.2Gbops)"


@dataclass(frozen=True)
class Budget:
    """One budget, exact.

    Attributes:
        text: as written.
        kind: "bits" (average per weight), "bytes" (everything stored), "seconds" (of a run), "bops" (of a sample).
        amount: in bits, bytes, seconds or bit operations.
        unit: as written: "bits", "MB", "ms", ...
        batch: samples of the run that may take `amount` seconds; 1 for all other kinds.
    """

    text: str
    kind: Kind
    amount: Fraction
    unit: str
    batch: int = 1

    @property
    def stored(self) -> bool:
        """Whether it is about what is stored, which needs no measurement and no data."""
        return self.kind in ("bits", "bytes")

    @property
    def resource(self) -> str:
        """What it is about, by the name that solvers know: the kind, or "seconds@4"."""
        return self.kind if self.batch == 1 else f"{self.kind}@{self.batch}"

    def spent(self, bits: int, weights: int, size: int) -> Fraction:
        """How much of this kind a model takes, for a budget about what is `stored`.

        Args:
            bits: stored for the weights in the average.
            weights: how many these are.
            size: bytes of everything stored.
        """
        assert self.stored
        return Fraction(bits, weights or 1) if self.kind == "bits" else Fraction(size)

    def show(self, amount: Fraction) -> str:
        """An amount in this budget's unit, rounded up so that what is shown would suffice."""
        scaled = Fraction(amount) / _UNITS[self.unit][1]
        digits = 4 if self.kind == "bits" else max(0, (4 if self.kind == "seconds" else 6) - len(str(int(scaled))))
        if _UNITS[self.unit][1] == 1 and self.kind in ("bytes", "bops"):
            digits = 0
        batch = "" if self.batch == 1 else f"@{self.batch}"
        return f"{math.ceil(scaled * 10**digits) / 10**digits:.{digits}f}{self.unit}{batch}"

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> Budget:
    """Read "3.5bits", "120MB", "120MiB", "89.9e6B", "8ms", "8ms@4" (four samples in a run), "1.2Gbops".

    A lone "b" is refused, as it may mean bits or bytes.
    """
    match = _NUMBER.fullmatch(text) if len(text) < 64 else None
    if match is None:
        raise BadOption(f"budget '{text[:64]}' is not an amount", "--budget", _HOW)
    number, suffix = match.groups()
    unit, at, batch = suffix.partition("@")
    if unit not in _UNITS:
        raise BadOption(f"budget '{text}' has no known unit", "--budget", _HOW)
    kind, scale = _UNITS[unit]
    if at and kind != "seconds":
        raise BadOption(f"budget '{text}' has samples behind '@', which only a latency takes", "--budget", _HOW)
    if at and not _BATCH.fullmatch(batch):
        what = f"budget '{text}' has no number of samples from 1 to 999999 behind '@'"
        raise BadOption(what, "--budget", f"{_HOW}; as in 8ms@4")
    if not (math.isfinite(float(number)) and float(number) > 0):
        raise BadOption(f"budget '{text}' is not a positive amount", "--budget", _HOW)
    return Budget(text.strip(), kind, Fraction(number) * scale, unit, int(batch) if at else 1)


def kept_sites(sites: Sequence[Site], patterns: Iterable[str]) -> tuple[str, ...]:
    """Names of the sites that match a pattern: a shell glob on their or their weight's name, or "embeddings" (tables).

    Raises BadOption for a pattern that matches nothing.
    """
    kept: dict[str, None] = {}
    for pattern in patterns:
        found = [s.name for s in sites if _matches(s, pattern)]
        if not found:
            some = ", ".join(s.name for s in sites[:3]) + (" ..." if len(sites) > 3 else "")
            raise BadOption(f"'{pattern}' matches no site", "--keep", f"name sites or globs; the model has {some}")
        kept |= dict.fromkeys(found)
    return tuple(kept)


def _matches(site: Site, pattern: str) -> bool:
    if pattern == "embeddings" and is_embedding(site):
        return True
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.weight.name or "", pattern)


def is_embedding(site: Site) -> bool:
    """Whether the weight is a lookup table (a head may share it)."""
    return any(user.op_type == "Gather" for user in site.users)


def float_bits(site: Site) -> int:
    """Stored bits of a site's weight in its own dtype."""
    tensor = site.weight.const_value
    assert tensor is not None
    return site.count * tensor.dtype.bitwidth


def site_bits(site: Site, plan: SitePlan | None) -> int:
    """Stored bits of a site's weight under a plan, its correction included; None or no weight format: float."""
    if plan is None or plan.weight is None:
        return float_bits(site) + site.branch_bits
    return plan.weight.stored_bits(site.rows, site.columns) + site.branch_bits


def stored_constants(model: ir.Model) -> Iterator[tuple[ir.Value | None, int]]:
    """Every constant of the graph and its subgraphs, with its bytes: initializers (with their value), Constant nodes.

    The bodies of functions are program text, as nodes are, and are not counted.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value.nbytes
        yield from ((None, size) for node in graph for size in _constant_bytes(node))


def _constant_bytes(node: ir.Node) -> Iterator[int]:
    value = node.attributes.get("value")
    if node.op_type == "Constant" and node.domain == "" and value is not None:
        yield value.as_tensor().nbytes


@dataclass(frozen=True)
class Row:
    """What one part of the model stores.

    Attributes:
        site: its name, or "(all other constants)".
        what: "embedding", "weight", "kept" or "other".
        weights: how many.
        spec: number format, or "float".
        bits, bytes: stored, scales and zero points included.
    """

    site: str
    what: str
    weights: int
    spec: str
    bits: int
    bytes: int


def breakdown(model: Model, plan: Plan | None = None) -> list[Row]:
    """What a plan (default: the model's own) stores, site by site, then everything else in one row.

    The graph must still be float; after lowering, `lowered_bytes` counts what is there.
    """
    sites = find_sites(model.ir)
    rest = other_bytes(model, sites) + (GRID_BYTES * len(model.ranges) if plan is None else 0)
    rows = [_row(site, model.plan if plan is None else plan) for site in sites]
    return [*rows, Row("(all other constants)", "other", 0, "float", 8 * rest, rest)]


def other_bytes(model: Model, sites: Sequence[Site]) -> int:
    """Stored bytes of everything that is no site's weight."""
    weights = {value for site in sites for value in (site.weight, *site.branch)}
    return sum(size for value, size in stored_constants(model.ir) if value not in weights)


def _row(site: Site, plan: Plan) -> Row:
    decided = None if site.name in plan.kept else plan.sites.get(site.name)
    bits = site_bits(site, decided)
    what = "kept" if site.name in plan.kept else "embedding" if is_embedding(site) else "weight"
    spec = "float" if decided is None or decided.weight is None else str(decided.weight)
    return Row(site.name, what, site.count, spec, bits, -(-bits // 8))


def weight_bits(model: Model, plan: Plan | None = None) -> tuple[int, int]:
    """(stored bits, number of weights) of all sites that are not kept, each shared weight once."""
    rows = [row for row in breakdown(model, plan) if row.what in ("embedding", "weight")]
    return sum(row.bits for row in rows), sum(row.weights for row in rows)


def bits_per_weight(model: Model, plan: Plan | None = None) -> float | None:
    """Average stored bits per weight, as a bits budget counts them; None if no weight is in the average."""
    bits, weights = weight_bits(model, plan)
    return bits / weights if weights else None


def bits_text(bits: float | None) -> str:
    """An average of bits per weight for people."""
    return "no weights in the average of bits" if bits is None else f"{bits:.3f} bits per weight"


def stored_bytes(model: Model, plan: Plan | None = None) -> int:
    """Everything that the plan stores, in bytes, as a byte budget counts it."""
    return sum(row.bytes for row in breakdown(model, plan))


def lowered_bytes(model: ir.Model) -> int:
    """Bytes of all constants of a graph as it is: after InsertQDQ, what its file stores beside the nodes."""
    return sum(size for _, size in stored_constants(model))
