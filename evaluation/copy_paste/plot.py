"""The copy-paste figures as a picture: where references and outputs face, how far the outputs turned, the table."""

from __future__ import annotations

from math import ceil, cos, radians, sin, sqrt

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...common.drawing.palette import COLOURS, GREY, INK, PAPER
from .metrics import Pairs
from .report import cell, coverage, rows

WIDTH, PANEL, TOP = 900, 450, 84
LINE = 22
FINE = 2  # drawn at so many times the size and reduced, since pillow's lines have jagged edges
GRID, WEDGE = (226, 226, 232), (250, 236, 222)
REFERENCE, OUTPUT, FLOOR = COLOURS["mllm"], COLOURS["vae"], (120, 120, 128)
RADIUS = 158
BIN = 10  # degrees


def report_plot(outputs: Pairs, floor: Pairs, model: str) -> Image.Image:
    """RGB, 900 px wide. Left: the subject seen from above with the camera below it, azimuth as direction and polar as
    distance from the zenith, a line from each reference to its output. Right: share of outputs by how far they turned
    away from their reference, area for area, the floor in grey."""
    height = TOP + 2 * RADIUS + 56 + 5 * LINE + 34
    image = Image.new("RGB", (WIDTH * FINE, height * FINE), PAPER)
    pen = _Pen(image)
    pen.text(24, 22, f"Copy-paste. {coverage(outputs)}", INK, 14)
    _facing(pen, PANEL / 2, TOP + RADIUS, outputs)
    _turned(pen, PANEL * 1.5, TOP + RADIUS, outputs, floor)
    _table(pen, TOP + 2 * RADIUS + 56, outputs, floor)
    pen.text(24, height - 20, f"orientation by {model}", GREY, 12)
    return image.reduce(FINE)


def plot_tensor(picture: Image.Image) -> Tensor:
    """(1, h, w, 3) float32 in 0..1: the host's IMAGE."""
    return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]


def _facing(pen: _Pen, x: float, y: float, outputs: Pairs) -> None:
    lowest = min(float(outputs.reference[:, 1].min()), float(outputs.generated[:, 1].min()), -29.0)
    lowest = -30 * ceil(-lowest / 30)

    def at(azimuth: float, polar: float) -> tuple[float, float]:
        """0 faces the camera, below; 90 faces the left of the picture."""
        distance = RADIUS * min(max(90 - polar, 0) / (90 - lowest), 1)
        return x - distance * sin(radians(azimuth)), y + distance * cos(radians(azimuth))

    for polar in range(60, lowest - 1, -30):
        pen.circle(x, y, RADIUS * (90 - polar) / (90 - lowest), outline=GREY if polar == 0 else GRID)
    for azimuth in range(0, 360, 45):
        pen.line([(x, y), at(azimuth, lowest)], GRID)
    for polar in range(60, lowest - 1, -30):
        pen.text(*at(202, polar), f"{polar}°", GREY, 11, "mm", back=True)
    pen.text(x, y + RADIUS + 14, "0° facing the camera", GREY, 12, "mm")
    pen.text(x, y - RADIUS - 14, "180°", GREY, 12, "mm")
    pen.text(x - RADIUS - 8, y, "90°", GREY, 12, "rm")
    pen.text(x + RADIUS + 8, y, "270°", GREY, 12, "lm")
    size = 5 if len(outputs.reference) <= 100 else 3
    ordered = sorted(zip(outputs.report.counted.tolist(), outputs.reference.tolist(), outputs.generated.tolist()))
    for kept, reference, generated in ordered:  # those that do not count lie below
        strength = 0.7 if kept else 0.25
        pen.line([at(*reference[:2]), at(*generated[:2])], _faint(INK, strength * 0.7))
    for kept, reference, generated in ordered:
        for (azimuth, polar, _), colour in ((generated, OUTPUT), (reference, REFERENCE)):
            pen.circle(*at(azimuth, polar), size, fill=colour if kept else _faint(colour), outline=PAPER)
    keys = [("reference", REFERENCE), ("output", OUTPUT), ("low confidence", _faint(INK))]
    pen.legend(24, TOP - 34, keys)


def _turned(pen: _Pen, x: float, y: float, outputs: Pairs, floor: Pairs) -> None:
    pen.slice(x, y, RADIUS, -20, 20, WEDGE)
    shares = {name: _shares(pairs) for name, pairs in (("outputs", outputs), ("floor", floor))}
    most = max(max(found) for found in shares.values())
    for part in (0.25, 0.5, 1.0):
        pen.circle(x, y, RADIUS * sqrt(part), outline=GRID)
    for turn in range(0, 360, 45):
        pen.line([(x, y), _direction(x, y, RADIUS, turn)], GRID)
    for number, share in enumerate(shares["outputs"]):
        if share:
            radius = RADIUS * sqrt(share / most)
            pen.slice(x, y, radius, BIN * (number - 0.5), BIN * (number + 0.5), OUTPUT, PAPER)
    outline = []
    for number, share in enumerate(shares["floor"]):
        radius = RADIUS * sqrt(share / most) if most else 0
        outline += [_direction(x, y, radius, BIN * (number + side)) for side in (-0.5, -0.25, 0, 0.25, 0.5)]
    if max(shares["floor"]):
        pen.line([*outline, outline[0]], FLOOR, 1.5)
    for part in (0.25, 0.5, 1.0) if most else ():
        place = _direction(x, y, RADIUS * sqrt(part), 157)
        pen.text(*place, f"{100 * part * most:.3g} %", GREY, 11, "mm", back=True)
    if not outputs.report.count:
        pen.text(x, y, "no pair counts", INK, 13, "mm", back=True)
    pen.text(x, y - RADIUS - 14, "0° as in the reference", GREY, 12, "mm")
    pen.text(x, y + RADIUS + 14, "180°", GREY, 12, "mm")
    pen.text(x + RADIUS + 8, y, "+90°", GREY, 12, "lm")
    pen.text(x - RADIUS - 8, y, "-90°", GREY, 12, "rm")
    keys = [("azimuth turned", OUTPUT), ("floor", FLOOR), ("recall's limit of 20°", WEDGE)]
    pen.legend(PANEL + 24, TOP - 34, keys)


def _table(pen: _Pen, top: float, outputs: Pairs, floor: Pairs) -> None:
    columns = (24, 190, 370, 550, 760)
    for left, title in zip(columns, ("", "azimuth difference", "polar difference", "average recall", "pairs")):
        pen.text(left, top, title, GREY, 13)
    for number, (name, figures) in enumerate(rows(outputs, floor), 1):
        cells = [cell(figures, key) for key in ("azimuth", "polar", "average_recall")]
        for left, text in zip(columns, (name, *cells, str(figures.count))):
            pen.text(left, top + number * LINE, text, GREY if "ungated" in name else INK, 13)
        pen.line([(24, top + (number - 0.5) * LINE), (WIDTH - 24, top + (number - 0.5) * LINE)], GRID)


def _shares(pairs: Pairs) -> list[float]:
    """Share of the pairs that count by signed azimuth difference, in bins about 0, BIN, 2 BIN ... degrees."""
    turn = (pairs.generated[:, 0] - pairs.reference[:, 0])[pairs.report.counted]
    number = ((turn + BIN / 2) % 360 / BIN).long().clamp(max=360 // BIN - 1)
    return (torch.bincount(number, minlength=360 // BIN) / max(len(turn), 1)).tolist()


def _direction(x: float, y: float, radius: float, turn: float) -> tuple[float, float]:
    """0 is up, positive is clockwise."""
    return x + radius * sin(radians(turn)), y - radius * cos(radians(turn))


def _faint(colour: tuple[int, int, int], share: float = 0.3) -> tuple[int, ...]:
    return tuple(round(share * c + (1 - share) * p) for c, p in zip(colour, PAPER))


class _Pen:
    """Pillow's drawing, in px of the reduced picture."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def text(self, x: float, y: float, text: str, colour, size: int, anchor: str = "lm", back: bool = False) -> float:
        """Returns the width. back: on paper of its own."""
        font, place = ImageFont.load_default(size * FINE), (x * FINE, y * FINE)
        if back:
            left, top, right, bottom = self.draw.textbbox(place, text, font, anchor)
            self.draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), PAPER)
        self.draw.text(place, text, colour, font, anchor=anchor)
        return font.getlength(text) / FINE

    def line(self, points, colour, width: float = 1) -> None:
        self.draw.line([(x * FINE, y * FINE) for x, y in points], colour, round(width * FINE), joint="curve")

    def circle(self, x: float, y: float, radius: float, fill=None, outline=None) -> None:
        self.draw.ellipse(self._box(x, y, radius), fill, outline, FINE if fill is None else 1)

    def slice(self, x: float, y: float, radius: float, start: float, end: float, fill, outline=None) -> None:
        self.draw.pieslice(self._box(x, y, radius), start - 90, end - 90, fill, outline, FINE)

    def legend(self, x: float, y: float, keys) -> None:
        for name, colour in keys:
            self.circle(x + 5, y, 5, fill=colour)
            x += 16 + self.text(x + 16, y, name, INK, 12) + 18

    def _box(self, x: float, y: float, radius: float) -> list[float]:
        return [value * FINE for value in (x - radius, y - radius, x + radius, y + radius)]
