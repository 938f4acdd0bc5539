"""Axes and what is drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, isfinite, log10

from PIL import Image, ImageDraw

from .palette import FAINT, GREY, GRID, INK, PAPER, typeface

FINE = 2  # lines are drawn at so many times the size and reduced, since pillow's have jagged edges


class Axes:
    """Axes and what is drawn on them, in a picture FINE times as large. box: left, top, right, bottom in final px."""

    def __init__(self, image: Image.Image, box: tuple[int, int, int, int], xs: Sequence[float], ys: Sequence[float]):
        self.image, self.pen, self.box = image, ImageDraw.Draw(image), box
        self.left, self.right = (min(xs), max(xs)) if len(xs) else (0, 1)
        if self.left == self.right:
            self.left, self.right = self.left - 1, self.right + 1
        low, high = (min(ys), max(ys)) if len(ys) else (0.0, 1.0)
        self.log = low > 0 and high > 10 * low
        low, high = self._scale(low), self._scale(high)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        self.low, self.high = low - margin, high + margin

    def _scale(self, y: float) -> float:
        return log10(y) if self.log else y

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the large picture; what is off the scale lies at its edge."""
        left, top, right, bottom = self.box
        low = self.low if self.log and y <= 0 else self._scale(y)
        share = (min(max(low, self.low), self.high) - self.low) / (self.high - self.low)
        x = left + (x - self.left) / (self.right - self.left) * (right - left)
        return x * FINE, (bottom - share * (bottom - top)) * FINE

    def frame(self, label: str, title: str = "") -> None:
        """Grid, numbers at the axes, label of the x axis, title above."""
        left, top, right, bottom = self.box
        pen, font = self.pen, typeface(12 * FINE)
        for value in self._rows():
            y = self.at(self.left, value)[1]
            pen.line((left * FINE, y, right * FINE, y), GRID, FINE)
            pen.text(((left - 7) * FINE, y), f"{value:.4g}", GREY, font, anchor="rm")
        for value in round_ticks(self.left, self.right, max(2, (right - left) // 90)):
            if value == int(value):  # steps are whole
                x = self.at(value, 1)[0]
                pen.line((x, top * FINE, x, bottom * FINE), GRID, FINE)
                pen.text((x, (bottom + 13) * FINE), f"{value:,.0f}", GREY, font, anchor="mm")
        pen.text(((left + right) / 2 * FINE, (bottom + 31) * FINE), label, GREY, font, anchor="mm")
        pen.rectangle([edge * FINE for edge in self.box], outline=FAINT, width=FINE)
        if title:
            pen.text((left * FINE, (top - 10) * FINE), title, INK, font, anchor="lm")

    def _rows(self) -> list[float]:
        if not self.log:
            return round_ticks(self.low, self.high, max(2, (self.box[3] - self.box[1]) // 36))
        for digits in ((1, 2, 5), (1, 3), (1,)):
            decades = range(floor(self.low), ceil(self.high) + 1)
            ticks = [d * 10.0**e for e in decades for d in digits if self.low <= log10(d * 10.0**e) <= self.high]
            if len(ticks) * 24 <= self.box[3] - self.box[1]:
                return ticks
        return ticks[:: ceil(len(ticks) * 24 / (self.box[3] - self.box[1]))]

    def line(self, xs: Sequence[float], ys: Sequence[float], colour, width: float) -> None:
        """A line through the points, broken where a value is no number."""
        part = []
        for x, y in [*zip(xs, ys), (0, float("nan"))]:
            if isfinite(y):
                part.append(self.at(x, y))
            else:
                if len(part) > 1:
                    self.pen.line(part, colour, round(width * FINE), joint="curve" if width > 1 else None)
                elif part:
                    (x, y), r = part[0], width * FINE
                    self.pen.ellipse((x - r, y - r, x + r, y + r), colour)
                part = []

    def points(self, xs: Sequence[float], ys: Sequence[float], colour, radius: float = 3) -> None:
        for x, y in zip(xs, ys):
            if isfinite(y):
                (x, y), r = self.at(x, y), radius * FINE
                self.pen.ellipse((x - r, y - r, x + r, y + r), colour, PAPER, 1)

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour) -> None:
        """The area between two lines, see-through; a single point gets a bar."""
        kept = [(x, a, b) for x, a, b in zip(xs, lows, highs) if isfinite(a) and isfinite(b)]
        shade = Image.new("L", self.image.size)
        pen = ImageDraw.Draw(shade)
        if len(kept) > 1:
            pen.polygon([self.at(x, a) for x, a, _ in kept] + [self.at(x, b) for x, _, b in kept[::-1]], 46)
        elif kept:
            (x, bottom), (_, top) = (self.at(kept[0][0], value) for value in kept[0][1:])
            pen.rectangle((x - 3 * FINE, top, x + 3 * FINE, bottom), 46)
        self.image.paste(Image.new("RGB", self.image.size, colour), mask=shade)

    def legend(self, keys: Sequence[tuple[str, tuple]], left: float, middle: float, title: str = "") -> None:
        """Title, then coloured keys, in one line from the left."""
        font, x, y = typeface(13 * FINE), left * FINE, middle * FINE
        if title:
            self.pen.text((x, y), title, INK, font, anchor="lm")
            x += font.getlength(title) + 24 * FINE
        for name, colour in keys:
            self.pen.line((x, y, x + 18 * FINE, y), colour, 4 * FINE)
            self.pen.text((x + 24 * FINE, y), name, INK, font, anchor="lm")
            x += font.getlength(name) + 44 * FINE


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(d * power for d in (1, 2, 5, 10) if d * power >= rough * (1 - 1e-9))
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
