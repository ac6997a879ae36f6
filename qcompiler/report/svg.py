"""Small SVG drawings: a frame with scales, gridlines and tick labels. Colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    """A straight map of [low, high] to [start, stop] in user units."""
    span = (high - low) or 1.0
    return lambda v: start + (v - low) / span * (stop - start)


def logarithmic(low: float, high: float, start: float, stop: float) -> Scale:
    """A map of positive values by their logarithm; values below `low` sit at its place."""
    inner = linear(math.log10(low), math.log10(high), start, stop)
    return lambda v: inner(math.log10(max(v, low)))


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten inside [low, high], thinned to at most `most`."""
    powers = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    step = max(1, -(-len(powers) // most))
    return [10.0**p for p in powers[::step]]


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks at 1, 2 or 5 times a power of ten inside [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short label: 0.003, 1e-7, 250."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}"


@dataclass
class Drawing:
    """An SVG of fixed user units that scales with the page.

    Attributes:
        width, height: user units (pixels at full width).
        left, right, top, bottom: margins around the plot.
    """

    width: float = 960
    height: float = 280
    left: float = 56
    right: float = 16
    top: float = 14
    bottom: float = 38
    parts: list[str] = field(default_factory=list[str])

    @property
    def x0(self) -> float:
        """Left edge of the plot."""
        return self.left

    @property
    def x1(self) -> float:
        """Right edge of the plot."""
        return self.width - self.right

    @property
    def y0(self) -> float:
        """Lower edge of the plot."""
        return self.height - self.bottom

    @property
    def y1(self) -> float:
        """Upper edge of the plot."""
        return self.top

    def rect(self, x: float, y: float, w: float, h: float, style: str, title: str = "", radius: float = 0) -> None:
        """A rectangle; `title` is its tooltip."""
        tip = f"<title>{escape(title)}</title>" if title else ""
        rounded = f' rx="{radius:g}"' if radius else ""
        self.parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(w, 0):.2f}" height="{max(h, 0):.2f}"{rounded} '
            f'style="{style}">{tip}</rect>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, css: str) -> None:
        """A straight line with a CSS class."""
        self.parts.append(f'<line x1="{x0:.2f}" y1="{y0:.2f}" x2="{x1:.2f}" y2="{y1:.2f}" class="{css}"/>')

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through points."""
        data = " ".join(f"{'L' if n else 'M'}{x:.2f} {y:.2f}" for n, (x, y) in enumerate(points))
        self.parts.append(f'<path d="{data}" class="{css}"/>')

    def dot(self, x: float, y: float, r: float, style: str, title: str = "") -> None:
        """A circle."""
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{r:g}" style="{style}">{tip}</circle>')

    def text(
        self, x: float, y: float, content: str, anchor: str = "middle", css: str = "tick", turn: float = 0
    ) -> None:
        """A label; `turn` in degrees."""
        rotate = f' transform="rotate({turn:g} {x:.2f} {y:.2f})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" class="{css}"{rotate}>{escape(content)}</text>'
        )

    def y_axis(self, ticks: Sequence[float], scale: Scale, label: str, form: Callable[[float], str] = number) -> None:
        """Gridlines with labels at the left."""
        for tick in ticks:
            y = scale(tick)
            self.line(self.x0, y, self.x1, y, "grid")
            self.text(self.x0 - 7, y + 3.5, form(tick), "end")
        self.text(13, (self.y0 + self.y1) / 2, label, css="axis", turn=-90)

    def x_axis(self, ticks: Sequence[float], scale: Scale, label: str, form: Callable[[float], str] = number) -> None:
        """Gridlines with labels below."""
        for tick in ticks:
            x = scale(tick)
            self.line(x, self.y1, x, self.y0, "grid")
            self.text(x, self.y0 + 15, form(tick))
        self.text((self.x0 + self.x1) / 2, self.height - 5, label, css="axis")

    def render(self, label: str) -> str:
        """The finished <svg> element; `label` is read out by screen readers."""
        body = "".join(self.parts)
        return f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'
