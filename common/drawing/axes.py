"""Axes and what is drawn on them."""

from collections.abc import Sequence
from math import ceil, floor, isfinite, log10

from .canvas import Canvas, Point
from .palette import FAINT, GREY, GRID, PAPER, Colour


class Axes:
    """Axes in a box (left, top, right, bottom in px) of a canvas, over `xs` and `ys`; values beyond are at its edge.

    The y axis is logarithmic where its values span more than a factor of ten.
    """

    def __init__(self, canvas: Canvas, box: tuple[int, int, int, int], xs: Sequence[float], ys: Sequence[float]):
        self.canvas, self.box = canvas, box
        self.left: float = min(xs, default=0)
        self.right: float = max(xs, default=1)
        if self.left == self.right:
            self.left, self.right = self.left - 1, self.right + 1
        low, high = (min(ys), max(ys)) if len(ys) else (0.0, 1.0)
        self.log = low > 0 and high > 10 * low
        low, high = self._scale(low), self._scale(high)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        self.low, self.high = low - margin, high + margin

    def _scale(self, y: float) -> float:
        return log10(y) if self.log else y

    def at(self, x: float, y: float) -> Point:
        """Where a point is on the canvas; what is off the scale is at its edge."""
        left, top, right, bottom = self.box
        low = self.low if self.log and y <= 0 else self._scale(y)
        share = (min(max(low, self.low), self.high) - self.low) / (self.high - self.low)
        return left + (x - self.left) / (self.right - self.left) * (right - left), bottom - share * (bottom - top)

    def frame(self, label: str, title: str = "") -> None:
        """Grid, numbers at the axes, label of the x axis, title above."""
        left, top, right, bottom = self.box
        for value in self._rows():
            y = self.at(self.left, value)[1]
            self.canvas.line([(left, y), (right, y)], GRID)
            self.canvas.text(left - 7, y, f"{value:.4g}", GREY, anchor="rm")
        for value in round_ticks(self.left, self.right, max(2, (right - left) // 90)):
            if value == int(value):  # steps are whole
                x = self.at(value, 1)[0]
                self.canvas.line([(x, top), (x, bottom)], GRID)
                self.canvas.text(x, bottom + 13, f"{value:,.0f}", GREY, anchor="mm")
        self.canvas.text((left + right) / 2, bottom + 31, label, GREY, anchor="mm")
        self.canvas.rectangle(self.box, outline=FAINT)
        if title:
            self.canvas.text(left, top - 10, title)

    def _rows(self) -> list[float]:
        if not self.log:
            return round_ticks(self.low, self.high, max(2, (self.box[3] - self.box[1]) // 36))
        for digits in ((1, 2, 5), (1, 3), (1,)):
            decades = range(floor(self.low), ceil(self.high) + 1)
            ticks = [d * 10.0**e for e in decades for d in digits if self.low <= log10(d * 10.0**e) <= self.high]
            if len(ticks) * 24 <= self.box[3] - self.box[1]:
                return ticks
        return ticks[:: ceil(len(ticks) * 24 / (self.box[3] - self.box[1]))]

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: Colour, width: float) -> None:
        """A line through the points, broken where a value is no number."""
        part: list[Point] = []
        for x, y in [*zip(xs, ys), (0, float("nan"))]:
            if isfinite(y):
                part.append(self.at(x, y))
            else:
                if len(part) > 1:
                    self.canvas.line(part, colour, width)
                elif part:
                    self.canvas.circle(*part[0], width, fill=colour)
                part = []

    def points(self, xs: Sequence[float], ys: Sequence[float], colour: Colour, radius: float = 3) -> None:
        """A disc at each point that is a number."""
        for x, y in zip(xs, ys):
            if isfinite(y):
                self.canvas.circle(*self.at(x, y), radius, fill=colour, outline=PAPER)

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: Colour) -> None:
        """The area between two lines, see-through; a single point gets a bar."""
        kept = [(x, a, b) for x, a, b in zip(xs, lows, highs) if isfinite(a) and isfinite(b)]
        below, above = ([self.at(row[0], row[i]) for row in kept] for i in (1, 2))
        if len(kept) == 1:
            below, above = ([(x - 3, y), (x + 3, y)] for ((x, y),) in (below, above))
        if kept:
            self.canvas.shade([*below, *above[::-1]], colour)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(d * power for d in (1, 2, 5, 10) if d * power >= rough * (1 - 1e-9))
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
