"""Pictures as PNG, by Pillow, which is there only where `hutch[pictures]` was installed."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hutch.errors import Unsupported
from hutch.sched.report.drawing import PAPER, Line, Picture, Rect, Text

if TYPE_CHECKING:
    from PIL import ImageDraw

__all__ = ["to_png"]

_SCALE = 2
# Drawn so many times larger than it is kept, and averaged: edges are smooth then.
_OVER = 2
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def to_png(picture: Picture) -> bytes:
    """Return a picture as PNG, with two pixels for each unit.

    Raises `Unsupported` where Pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise Unsupported(
            "writing PNG needs Pillow", hint="pip install 'hutch[pictures]', or write SVG"
        ) from None
    factor = _SCALE * _OVER
    size = round(picture.width * factor), round(picture.height * factor)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    fonts: dict[float, Any] = {}
    for shape in picture.shapes:
        _draw(draw, shape, factor, fonts)
    small = image.resize((size[0] // _OVER, size[1] // _OVER), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


def _draw(draw: ImageDraw.ImageDraw, shape: object, f: float, fonts: dict[float, Any]) -> None:
    match shape:
        case Rect():
            x, y = shape.x * f, shape.y * f
            corner = (x + max(shape.width * f, 1), y + max(shape.height * f, 1))
            draw.rectangle((x, y, *corner), fill=shape.fill, outline=shape.edge or None)
        case Line():
            points = [(x * f, y * f) for x, y in shape.points]
            width = max(1, round(shape.width * f))
            pieces = _dashes(points, f) if shape.dashed else [points]
            for piece in pieces:
                draw.line(piece, fill=shape.colour, width=width, joint="curve")
        case Text():
            draw.text(
                (shape.x * f, shape.y * f),
                shape.words,
                fill=shape.colour,
                font=_font(shape.size * f, fonts),
                anchor=_ANCHORS[shape.anchor],
                stroke_width=round(f / 4) if shape.bold else 0,
                stroke_fill=shape.colour,
            )


def _font(size: float, fonts: dict[float, Any]) -> Any:
    from PIL import ImageFont

    if size not in fonts:
        fonts[size] = ImageFont.load_default(size)
    return fonts[size]


def _dashes(points: list[tuple[float, float]], f: float) -> list[list[tuple[float, float]]]:
    """Return the pieces that dashes leave of a line, measured along it."""
    on, off = 4 * f, 3 * f
    pieces: list[list[tuple[float, float]]] = []
    walked = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = 0.0
        while at < length:
            phase = (walked + at) % (on + off)
            step = min((on if phase < on else on + off) - phase, length - at) + 1e-9
            if phase < on:
                low, high = at / length, min((at + step) / length, 1)
                ends = [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (low, high)]
                pieces.append(ends)
            at += step
        walked += length
    return pieces
