"""Squarified treemaps (Bruls, Huizing, van Wijk 2000): areas in a rectangle, as square as they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, width, height."""

    x: float
    y: float
    w: float
    h: float


def squarify(values: Sequence[float], box: Box) -> list[Box]:
    """One box for each positive value, areas in proportion, in the order of the values."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    factor = box.w * box.h / sum(values)
    placed: dict[int, Box] = {}
    row: list[int] = []
    for index in order:
        side = min(box.w, box.h)
        if row and _worst([*row, index], values, factor, side) > _worst(row, values, factor, side):
            box = _lay(row, values, factor, box, placed)
            row = []
        row.append(index)
    if row:
        _lay(row, values, factor, box, placed)
    return [placed[i] for i in range(len(values))]


def _worst(row: Sequence[int], values: Sequence[float], factor: float, side: float) -> float:
    """The largest aspect ratio of a row of boxes laid along `side`."""
    areas = [values[i] * factor for i in row]
    total = sum(areas)
    return max(side * side * max(areas) / (total * total), total * total / (side * side * min(areas)))


def _lay(row: Sequence[int], values: Sequence[float], factor: float, box: Box, placed: dict[int, Box]) -> Box:
    """Place a row along the shorter side; return what is left of the box."""
    total = sum(values[i] for i in row) * factor
    upright = box.w >= box.h
    thick = total / (box.h if upright else box.w)
    at = box.y if upright else box.x
    for i in row:
        length = values[i] * factor / thick
        placed[i] = Box(box.x, at, thick, length) if upright else Box(at, box.y, length, thick)
        at += length
    if upright:
        return Box(box.x + thick, box.y, max(box.w - thick, 1e-9), box.h)
    return Box(box.x, box.y + thick, box.w, max(box.h - thick, 1e-9))
