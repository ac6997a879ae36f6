"""The quantized weights of many allocations, made once and kept within a limit of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from qcompiler.formats import QuantSpec
from qcompiler.formats.varied import Effective, effective
from qcompiler.graph.sites import Site
from qcompiler.measure.decoded import decoded_weight

Array = npt.NDArray[Any]


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class QuantizedWeights:
    """Weights of sites in their formats: nearest, clipped for the smallest squared error, as `probes` does it.

    Args:
        sites: of a float model.
        specs: for each site its formats.
        memory: bytes; what was used least recently goes first. Codes take three quarters of it (fitting is slow),
            decoded arrays the rest.
    """

    def __init__(self, sites: Sequence[Site], specs: Sequence[Sequence[QuantSpec]], memory: int) -> None:
        self._sites, self._specs = sites, specs
        self._codes = _Recent[Effective](memory // 4 * 3)
        self._arrays = _Recent[Array](memory // 4)

    def get(self, site: int, option: int) -> Array:
        """The decoded weight of a site, in the shape and type of its initializer; an option < 0 is the float weight."""
        own = self._sites[site]
        if option < 0:
            return own.array()

        def decode() -> Array:
            codes = self._codes.get((site, option), lambda: effective(own.matrix(), self._specs[site][option]))
            return decoded_weight(own, codes)

        return self._arrays.get((site, option), decode)


class _Recent(Generic[T]):
    """What was used last, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._items: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not here (any more)."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        value = self._items[key] = make()
        self._held += value.nbytes
        while self._held > self._limit:
            self._held -= self._items.popitem(last=False)[1].nbytes
        return value
