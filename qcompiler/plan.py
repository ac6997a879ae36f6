"""The plan: which number format every site gets. Data only, with a JSON form.

A site without an entry, or with `weight=None`, keeps its float weight. Activations are one of
"float" (untouched), "static" (ranges fixed by calibration) or "dynamic" (ranges taken from the data at run
time, one scale per row, that is per token or per pixel row of the matrix product).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qcompiler.errors import BadOption
from qcompiler.formats import QuantSpec, parse_spec

ActivationMode = Literal["float", "static", "dynamic"]
ROW_BITS = range(3, 9)  # of dynamic activations


@dataclass(frozen=True)
class SitePlan:
    """The decision for one site.

    Attributes:
        weight: how the weight is stored, or None for float.
        activation: how the input of the operation is quantized; "static" is asymmetric uint8 per tensor,
            "dynamic" symmetric per row.
        activation_bits: of the codes of dynamic activations, 3 to 8; 8 otherwise.
        activation_clip: share of a row's largest magnitude that the largest code of dynamic activations stands for, in
            (0, 1]; what is beyond it is clipped (QuaRot takes 0.9 at 4 bits).
        variant: name of the transform that the site was given with its format (`qcompiler.variants`), or empty. The
            graph of the plan has it already.
    """

    weight: QuantSpec | None
    activation: ActivationMode = "float"
    variant: str = ""
    activation_bits: int = 8
    activation_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.activation_bits not in ROW_BITS or not 0 < self.activation_clip <= 1:
            what = f"activations of {self.activation_bits} bits, clipped at {self.activation_clip}"
            raise BadOption(what, fix="give 3 to 8 bits, and a share of more than 0 up to 1")
        if self.activation != "dynamic" and (self.activation_bits, self.activation_clip) != (8, 1):
            fix = 'make them "dynamic", or leave the width at 8 bits and the clip at 1'
            raise BadOption(f"{self.activation} activations have no width and no clip of their own", fix=fix)

    @property
    def activation_text(self) -> str:
        """The activation in words, with its width where that isn't 8: "float", "static", "dynamic", "dynamic 4-bit"."""
        return self.activation if self.activation_bits == 8 else f"{self.activation} {self.activation_bits}-bit"

    def to_json(self) -> dict[str, Any]:
        """A JSON object of strings and numbers, without what has its usual value."""
        weight = None if self.weight is None else str(self.weight)
        usual = SitePlan(None)
        rest = ("variant", "activation_bits", "activation_clip")
        found = {name: getattr(self, name) for name in rest if getattr(self, name) != getattr(usual, name)}
        return {"weight": weight, "activation": self.activation, **found}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SitePlan:
        """The inverse of `to_json`."""
        if data["activation"] not in ("float", "static", "dynamic"):
            raise BadOption(f"unknown activation mode '{data['activation']}'", fix="use float, static or dynamic")
        weight = None if data["weight"] is None else parse_spec(data["weight"])
        bits, clip = data.get("activation_bits", 8), data.get("activation_clip", 1.0)
        return SitePlan(weight, data["activation"], data.get("variant", ""), bits, clip)


@dataclass(frozen=True)
class Plan:
    """Site name -> SitePlan, with what is known about the plan as a whole.

    Attributes:
        sites: the decisions.
        solution: what the solver said: predicted_loss, lower_bound, gap, method, seconds, curve
            (list of [bits, loss] points); empty for a plan made by hand.
        kept: sites that the user keeps float (`--keep`): they are outside the average of bits per weight.
    """

    sites: Mapping[str, SitePlan] = field(default_factory=dict[str, SitePlan])
    solution: Mapping[str, Any] = field(default_factory=dict[str, Any])
    kept: tuple[str, ...] = ()

    def with_sites(self, changes: Mapping[str, SitePlan]) -> Plan:
        """A copy in which some sites are decided differently."""
        return replace(self, sites={**self.sites, **changes})

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "sites": {name: plan.to_json() for name, plan in self.sites.items()},
            "solution": dict(self.solution),
            "kept": list(self.kept),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        sites = {k: SitePlan.from_json(v) for k, v in data["sites"].items()}
        return Plan(sites, dict(data["solution"]), tuple(data.get("kept", ())))
