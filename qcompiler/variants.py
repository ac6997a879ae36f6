"""What a transform must offer to be an option of allocation: on or off for each site, as a format is.

The variants themselves live in `qcompiler.passes.transform` and are found by name in `registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qcompiler.errors import Refusal
from qcompiler.formats import QuantSpec
from qcompiler.formats.varied import Effect
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.progress import Progress


@dataclass(frozen=True)
class Offer:
    """Where a transform may be had.

    Attributes:
        effects: by site name what it does to the weight.
        tokens: by site name what tells the settings apart; none where model and data decide them.
        together: sites that have it all or none, those of `effects`; a site alone needs no entry.
        refused: where it cannot be had, and why.
    """

    effects: Mapping[str, Effect]
    tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    together: Sequence[tuple[str, ...]] = ()
    refused: tuple[Refusal, ...] = ()


class Variant(Protocol):
    """A transform that leaves the float function of a site as it is. Made without arguments, used for one model.

    `offer` is asked first, `commit` (of what was offered) after the decision.
    """

    @property
    def free(self) -> bool:
        """Whether it costs nothing at run time and stores nothing; else it is offered for fewer formats."""
        ...

    def offer(self, model: Model, formats: Mapping[Site, Sequence[QuantSpec]], progress: Progress) -> Offer:
        """Where it can be had on a float model; `formats` are those that each site may take."""
        ...

    def commit(self, model: Model, chosen: Mapping[str, QuantSpec]) -> None:
        """Change the graph where it was chosen: plain rounding of these sites then has the effect that was offered.

        Args:
            model: the model of `offer`; other transforms may have scaled its channels since then.
            chosen: by site name the plain format.
        """
        ...
