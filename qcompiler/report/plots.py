"""The charts of the report, as inline SVG. Each takes plain data of `report.json` and gives "" without any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.report.svg import Drawing, decades, linear, logarithmic, number, round_ticks
from qcompiler.report.treemap import Box, squarify

Layer = Mapping[str, Any]
_FLOAT_BITS = 9.2  # where bars of unquantized layers end
_MOST_RANGES = 160
_CHOSEN = "fill:var(--hot);stroke:var(--card);stroke-width:2"


def bits_color(bits: float | None) -> str:
    """The CSS variable of a width; float weights have their own."""
    return "var(--float)" if bits is None else f"var(--b{min(max(round(bits), 2), 8)})"


def size(count: float) -> str:
    """Bytes for people: 940 B, 12.3 kB, 4.56 MB."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count:.0f} B"


def bits_per_layer(layers: Sequence[Layer]) -> str:
    """Bars in graph order: height and colour are the width, wide bars hold more weights (by square root)."""
    if not layers:
        return ""
    d = Drawing(height=250)
    y = linear(0, _FLOAT_BITS, d.y0, d.y1)
    d.y_axis([2, 3, 4, 5, 6, 7, 8], y, "bits")
    weights = [math.sqrt(layer["count"]) for layer in layers]
    floor = sum(weights) / len(weights) * 0.25
    weights = [w + floor for w in weights]
    room, x = (d.x1 - d.x0) / sum(weights), d.x0
    gap = min(2.0, 0.15 * (d.x1 - d.x0) / len(layers))
    for layer, weight in zip(layers, weights, strict=True):
        bits = layer["bits"]
        top = y(_FLOAT_BITS if bits is None else bits)
        form = f"{layer['format']}, activations {layer['activation']}"
        tip = f"{layer['name']} ({layer['op']})\n{form}\n{size(layer['bytes'])}"
        d.rect(x, top, weight * room - gap, d.y0 - top, f"fill:{bits_color(bits)}", tip, radius=min(2.0, gap))
        x += weight * room
    d.line(d.x0, d.y0, d.x1, d.y0, "base")
    d.text(
        (d.x0 + d.x1) / 2,
        d.height - 8,
        "layers in graph order; wide bars hold more weights, grey is float",
        css="axis",
    )
    return d.render("Bits per layer in graph order")


def predicted_realised(layers: Sequence[Layer], data: str) -> str:
    """Per layer, loss predicted at allocation against loss of the final codes on `data`, as the axis calls it."""
    points = [
        (layer["predicted"], layer["realised"], layer)
        for layer in layers
        if (layer["predicted"] or 0) > 0 and (layer["realised"] or 0) > 0
    ]
    if len(points) < 2:
        return ""
    d = Drawing(width=470, height=340, left=64)
    ends = [v for a, b, _ in points for v in (a, b)]
    low, high = 10 ** math.floor(math.log10(min(ends))), 10 ** math.ceil(math.log10(max(ends)))
    x, y = logarithmic(low, high, d.x0, d.x1), logarithmic(low, high, d.y0, d.y1)
    d.y_axis(decades(low, high), y, f"realised loss, {data}")
    d.x_axis(decades(low, high), x, "predicted loss, calibration data")
    d.line(x(low), y(low), x(high), y(high), "guide")
    for predicted, realised, layer in points:
        tip = f"{layer['name']} ({layer['format']})\npredicted {predicted:.3g}, realised {realised:.3g}"
        style = f"fill:{bits_color(layer['bits'])};stroke:var(--card);stroke-width:.8"
        d.dot(x(predicted), y(realised), 4.2, style, tip)
    return d.render("Predicted against realised loss per layer")


def size_curve(curve: Mapping[str, Any] | None) -> str:
    """The best loss at each size, the chosen point, and the proven lower bound at the chosen size.

    With `bounds` in `curve`, [(bits, bound)], what is proven at every size is drawn as well.
    """
    points: list[tuple[float, float]] = [] if not curve else [(b, v) for b, v in curve["points"] if v > 0]
    if not curve or len(points) < 2:
        return ""
    d = Drawing(width=470, height=340, left=64)
    bits, loss = curve["chosen"]
    extra: list[float] = [v for v in (loss, curve.get("lower_bound")) if v and v > 0]
    losses = [v for _, v in points] + extra
    low, high = min(losses) / 1.6, max(losses) * 1.6
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    x, y = linear(left, right, d.x0, d.x1), logarithmic(low, high, d.y0, d.y1)
    ticks = decades(low, high)
    d.y_axis(ticks if len(ticks) > 1 else [low * 1.6, high / 1.6], y, "predicted loss")
    d.x_axis(round_ticks(left, right), x, "stored bits per weight")
    d.path([(x(b), y(v)) for b, v in sorted(points)], "curve")
    proven: list[tuple[float, float]] = [(b, v) for b, v in curve.get("bounds", ()) if v >= low]
    if len(proven) > 1:
        d.path([(x(b), y(v)) for b, v in sorted(proven)], "bound")
    for b, v in points:
        d.dot(x(b), y(v), 2, "fill:var(--accent)", f"{b:.3f} bits: loss {v:.3g}")
    if loss and loss > 0:
        d.line(x(bits), d.y0, x(bits), y(loss), "guide")
        d.dot(
            x(bits),
            y(loss),
            6.5,
            "fill:var(--hot);stroke:var(--card);stroke-width:2",
            f"chosen: {bits:.3f} bits, loss {loss:.3g}",
        )
        bound = curve.get("lower_bound")
        if bound and bound > 0:
            d.dot(x(bits), y(bound), 9.5, "fill:none;stroke:var(--good);stroke-width:1.6", f"proven bound {bound:.3g}")
        side = "start" if x(bits) < (d.x0 + d.x1) / 2 else "end"
        shift = 12 if side == "start" else -12
        d.text(x(bits) + shift, y(loss) - 9, f"chosen: {bits:.2f} bits, {number(loss)}", side, css="callout")
    return d.render("Size against predicted loss")


def byte_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    """One stacked bar: what kind of data the stored bytes are."""
    parts = [p for p in parts if p["bytes"] > 0]
    total = sum(p["bytes"] for p in parts)
    if not total:
        return ""
    d = Drawing(height=34 + 20 * -(-len(parts) // 4), left=0, right=0, top=0, bottom=0)
    x = 0.0
    for number_, part in enumerate(parts):
        wide = part["bytes"] / total * d.width
        tip = f"{part['name']}: {size(part['bytes'])}, {part['bytes'] / total:.1%}"
        d.rect(x, 0, wide - 1.5, 24, f"fill:var(--p{number_ % 6})", tip, radius=2)
        x += wide
        column, row = number_ % 4, number_ // 4
        d.rect(column * 240, 35 + 20 * row, 10, 10, f"fill:var(--p{number_ % 6})", radius=2)
        label = f"{part['name']} {size(part['bytes'])} ({part['bytes'] / total:.0%})"
        d.text(column * 240 + 16, 44 + 20 * row, label, "start", css="legend")
    return d.render("What the stored bytes are")


def byte_treemap(layers: Sequence[Layer]) -> str:
    """Area is stored bytes, colour is the width."""
    shown = [layer for layer in layers if layer["bytes"] > 0]
    if not shown:
        return ""
    d = Drawing(height=300, left=0, right=0, top=0, bottom=0)
    boxes = squarify([layer["bytes"] for layer in shown], Box(0, 0, d.width, d.height))
    total = sum(layer["bytes"] for layer in shown)
    for layer, box in zip(shown, boxes, strict=True):
        share = layer["bytes"] / total
        tip = f"{layer['name']}\n{layer['format']}, {size(layer['bytes'])} ({share:.1%})"
        d.rect(box.x, box.y, box.w - 1.2, box.h - 1.2, f"fill:{bits_color(layer['bits'])}", tip, radius=1.5)
        name = str(layer["name"])
        fits = int((box.w - 14) / 7.4)
        if box.h > 36 and fits >= 8:
            short = name if len(name) <= fits else "…" + name[-(fits - 1) :]
            css = "box plain" if layer["bits"] is None else "box light" if layer["bits"] <= 4 else "box"
            d.text(box.x + 7, box.y + 17, short, "start", css=css)
            wide = f"{layer['stored_bits']:.2f} bits, {size(layer['bytes'])}"
            line = wide if box.w > 140 else size(layer["bytes"])
            d.text(box.x + 7, box.y + 31, line, "start", css=f"{css} small")
    return d.render("Stored bytes by layer")


def activation_ranges(ranges: Sequence[Mapping[str, Any]]) -> str:
    """Seen minimum to maximum (pale) and the calibrated 8-bit range (full), one bar a value."""
    shown = [r for r in ranges if r["before"] is not None][:_MOST_RANGES]
    if not shown:
        return ""
    d = Drawing(height=270)
    ends = [abs(v) for r in shown for v in (*r["before"], *r["after"])]
    unit = sorted(ends)[len(ends) // 2] or 1.0
    squash = lambda v: math.asinh(v / unit)  # noqa: E731
    low = min(min(r["before"][0], r["after"][0]) for r in shown)
    high = max(max(r["before"][1], r["after"][1]) for r in shown)
    inner = linear(squash(low), squash(high), d.y0, d.y1)
    y = lambda v: inner(squash(v))  # noqa: E731
    ticks = sorted({t for t in (low, -unit, 0.0, unit, high) if low <= t <= high})
    spaced = [t for n, t in enumerate(ticks) if n == 0 or abs(y(t) - y(ticks[n - 1])) > 14]
    d.y_axis(spaced, y, "activation value")
    step = (d.x1 - d.x0) / len(shown)
    for index, item in enumerate(shown):
        x = d.x0 + index * step
        (a, b), (c, e) = item["before"], item["after"]
        tip = f"{item['value']}\nseen {a:.4g} to {b:.4g}\nrange {c:.4g} to {e:.4g}"
        d.rect(x + step * 0.12, y(b), step * 0.76, y(a) - y(b), "fill:var(--accent);fill-opacity:.25", tip)
        d.rect(x + step * 0.3, y(e), step * 0.4, y(c) - y(e), "fill:var(--accent)", tip, radius=1)
    d.text((d.x0 + d.x1) / 2, d.height - 8, "pale: values seen in calibration; full: 8-bit range", css="axis")
    return d.render("Activation ranges before and after")
