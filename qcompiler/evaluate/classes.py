"""Which output of a model holds class scores, if one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from qcompiler.measure.loss import Kind, output_kind

Array = npt.NDArray[Any]


def kinds_of_outputs(feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Kind]:
    """What every output of floats is, judged by one batch: at most one holds class scores, all others "values".

    That one is the first that looks like class scores (`measure.loss.output_kind`) and is no state. A state has the
    shape and type of an input, for which it is the next value: whatever its numbers look like, they are no classes.
    Where all outputs have the shape of an input (a classifier with as many classes as features), none is taken for
    a state.

    Args:
        feeds: the inputs.
        outputs: of the original, in the order of the graph.
    """
    floats = [name for name, array in outputs.items() if array.dtype.kind == "f"]
    forms = {(array.shape, array.dtype) for array in feeds.values()}
    free = [name for name in floats if (outputs[name].shape, outputs[name].dtype) not in forms] or floats
    kinds: dict[str, Kind] = dict.fromkeys(floats, "values")
    for name in free:
        kinds[name] = output_kind(outputs[name])
        if kinds[name] != "values":
            break
    return kinds


def class_output(kinds: Mapping[str, Kind]) -> str | None:
    """The output that holds class scores."""
    return next((name for name, kind in kinds.items() if kind != "values"), None)
