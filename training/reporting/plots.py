"""Pictures of a training run: loss curve, validation losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite, log10

import numpy
from PIL import Image, ImageDraw

from ...common.drawing.sheet import GREY, WIDTH, typeface
from ...sampling.stage_plot import COLOURS, FAINT, INK, PAPER
from .losses import ALL, CONDITIONS, Loss, conditions, stages, with_all

FINE = 2  # lines are drawn at so many times the size and reduced, since pillow's have jagged edges
GRID = (232, 232, 237)
TRAINING, HELD_OUT = COLOURS["mllm"], COLOURS["vae"]
LINES = {**COLOURS, "both": (70, 150, 96)}
OTHERS = ((150, 90, 180), (190, 70, 90), (90, 90, 96))


def loss_curve(
    steps: Sequence[int], losses: Sequence[float], held_out: Sequence[tuple[int, float]] = (), title: str = ""
) -> Image.Image:
    """Training losses over steps: every one faintly, their running mean, and held-out losses (step, loss) as points.

    The running mean is exponential over a fiftieth of the run (our choice). The axis is logarithmic where what it shows
    spans more than a factor of ten. Losses that are no numbers leave a gap.
    """
    if len(steps) != len(losses):
        raise ValueError(f"loss_curve got {len(steps)} steps and {len(losses)} losses, expected as many of each.")
    smooth, span = _running_mean(losses)
    shown = [v for v in smooth if isfinite(v)] + [loss for _, loss in held_out if isfinite(loss)]
    finite = numpy.array([loss for loss in losses if isfinite(loss)])
    if len(finite):  # single steps may lie far off: they may leave the picture
        shown += list(numpy.quantile(finite, (0.01, 0.99)))
    image = Image.new("RGB", (WIDTH * FINE, 384 * FINE), PAPER)
    panel = Panel(image, (64, 40, WIDTH - 20, 384 - 46), [*steps, *(step for step, _ in held_out)], shown)
    panel.frame("step")
    keys = [("training loss", _faint(TRAINING)), (f"running mean over {span} steps", TRAINING)]
    if span > 1:
        panel.line(steps, losses, _faint(TRAINING), 1)
    else:  # a run so short has no mean
        keys = [("training loss", TRAINING)]
    panel.line(steps, smooth, TRAINING, 2.5)
    if held_out:
        panel.line(*zip(*held_out), HELD_OUT, 2)
        panel.points(*zip(*held_out), HELD_OUT)
        keys.append(("held-out loss", HELD_OUT))
    panel.legend(keys if len(losses) or held_out else [("no losses yet", FAINT)], 64, 16, title)
    return image.reduce(FINE)


def validation_plot(history: Mapping[int, Sequence[Loss]], title: str = "held-out loss") -> Image.Image:
    """Held-out losses by training step: a panel per stage and one for all flow times, in each a line per condition with
    its 95 % interval shaded."""
    history = {step: with_all(history[step]) for step in sorted(history)}
    rows = [row for step in history for row in history[step]]
    names, columns = conditions(rows), 2
    panels = stages(rows) or [ALL]
    colours = {name: LINES.get(name) or OTHERS[i % len(OTHERS)] for i, name in enumerate(names)}
    high, lines = 230, ceil(len(panels) / columns)
    image = Image.new("RGB", (WIDTH * FINE, (40 + lines * high) * FINE), PAPER)
    for number, stage in enumerate(panels):
        left, top = (number % columns) * (WIDTH // columns), 40 + (number // columns) * high
        found = [row for row in rows if row.stage == stage]
        shown = [value for row in found for value in (row.mean, row.low, row.high) if isfinite(value)]
        panel = Panel(image, (left + 64, top + 20, left + WIDTH // columns - 14, top + high - 46), list(history), shown)
        panel.frame("step", stage if stage != ALL else "all flow times")
        series = {
            name: [(s, row) for s in history for row in history[s] if (row.condition, row.stage) == (name, stage)]
            for name in names
        }
        for name, points in series.items():
            panel.band([s for s, _ in points], [r.low for _, r in points], [r.high for _, r in points], colours[name])
        for name, points in series.items():
            panel.line([s for s, _ in points], [r.mean for _, r in points], colours[name], 2)
            panel.points([s for s, _ in points], [r.mean for _, r in points], colours[name])
    panel.legend([(CONDITIONS.get(name, name), colours[name]) for name in names], 64, 16, title)
    return image.reduce(FINE)


class Panel:
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


def _running_mean(losses: Sequence[float]) -> tuple[list[float], int]:
    """Exponential mean, unbiased at its start, and its length in steps."""
    span = max(1, len(losses) // 50)
    keep, total, weight, out = 1 - 1 / span, 0.0, 0.0, []
    for loss in losses:
        if isfinite(loss):
            total, weight = keep * total + loss, keep * weight + 1
        out.append(total / weight if weight else float("nan"))
    return out, span


def _faint(colour: tuple[int, int, int], share: float = 0.35) -> tuple[int, int, int]:
    return tuple(round(share * c + (1 - share) * p) for c, p in zip(colour, PAPER))
