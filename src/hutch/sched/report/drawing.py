"""Pictures as data: rectangles, lines and words, written as SVG or handed to a rasteriser.

Colours are `#rrggbb`. The origin is at the top left; units are pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import msgspec

__all__ = ["COLOURS", "DARK", "GREY", "GRID", "GROUND", "INK", "PAPER"]
__all__ += ["Line", "Picture", "Rect", "Text", "ink_on", "to_svg"]

INK = "#24292f"
GREY = "#8c959f"
PAPER = "#ffffff"
GROUND = "#f6f8fa"
"""What is drawn upon, within the paper."""
GRID = "#d8dee4"
DARK = {PAPER: "#15191f", GROUND: "#1d232b", GRID: "#3d444d", INK: "#e6edf3", GREY: "#9198a1"}
"""What stands for these colours where a page is dark."""
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f3c8d",
    "#6b8e23",
    "#b22222",
    "#1f9e9e",
    "#8c564b",
    "#4b5d67",
    "#c0a000",
    "#5a4fcf",
)
"""Told apart with colour-blind eyes for the first six (Okabe and Ito)."""


class Rect(msgspec.Struct, frozen=True):
    """A filled rectangle; `label` is shown where a viewer points at it."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    label: str = ""
    edge: str = ""


class Line(msgspec.Struct, frozen=True):
    """A line through points."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1
    dashed: bool = False


class Text(msgspec.Struct, frozen=True):
    """Words; `anchor` is start, middle or end, `y` the base line."""

    x: float
    y: float
    words: str
    size: float = 12
    colour: str = INK
    anchor: str = "start"
    bold: bool = False


Shape = Rect | Line | Text


class Picture(msgspec.Struct):
    """Shapes on paper, drawn in order."""

    width: float
    height: float
    shapes: list[Shape]
    title: str = ""


def ink_on(fill: str) -> str:
    """Return the colour, light or dark, in which words can be read on another; by WCAG 2's
    relative luminance."""
    red, green, blue = (_linear(int(fill[at : at + 2], 16) / 255) for at in (1, 3, 5))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if luminance < 0.3 else "#111418"


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def to_svg(picture: Picture) -> str:
    """Return a picture as an SVG document of its own, with white paper."""
    width, height = _n(picture.width), _n(picture.height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" role="img">',
        f"<title>{escape(picture.title)}</title>" if picture.title else "",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    parts += [_shape(shape) for shape in picture.shapes]
    parts.append("</svg>")
    return "\n".join(part for part in parts if part) + "\n"


def _shape(shape: Shape) -> str:
    match shape:
        case Rect():
            edge = f' stroke="{shape.edge}" stroke-width="0.5"' if shape.edge else ""
            body = (
                f'<rect x="{_n(shape.x)}" y="{_n(shape.y)}" width="{_n(shape.width)}" '
                f'height="{_n(shape.height)}" fill="{shape.fill}"{edge}'
            )
            if not shape.label:
                return body + "/>"
            return f"{body}><title>{escape(shape.label)}</title></rect>"
        case Line():
            points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
            dashes = ' stroke-dasharray="4 3"' if shape.dashed else ""
            return (
                f'<polyline points="{points}" fill="none" stroke="{shape.colour}" '
                f'stroke-width="{_n(shape.width)}" stroke-linejoin="round"{dashes}/>'
            )
        case Text():
            anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            weight = ' font-weight="600"' if shape.bold else ""
            return (
                f'<text x="{_n(shape.x)}" y="{_n(shape.y)}" font-size="{_n(shape.size)}" '
                f'fill="{shape.colour}"{anchor}{weight}>{escape(shape.words)}</text>'
            )


def _n(value: float) -> str:
    """Return a number with two digits at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
