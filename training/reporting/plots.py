"""Pictures of a training run: loss curve, validation losses."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite

import numpy
from PIL import Image

from ...common.drawing.axes import Axes
from ...common.drawing.canvas import Canvas
from ...common.drawing.palette import BLUE, FAINT, GREEN, GREY, ORANGE, PURPLE, RED, WIDTH, faint
from .losses import ALL, CONDITIONS, Loss, bins, conditions, with_all

TRAINING, HELD_OUT = BLUE, ORANGE
LINES = {"mllm": BLUE, "vae": ORANGE, "both": GREEN}
OTHERS = (PURPLE, RED, GREY)


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
    canvas = Canvas(WIDTH, 384)
    panel = Axes(canvas, (64, 40, WIDTH - 20, 384 - 46), [*steps, *(step for step, _ in held_out)], shown)
    panel.frame("step")
    keys = [("training loss", faint(TRAINING)), (f"running mean over {span} steps", TRAINING)]
    if span > 1:
        panel.line(steps, losses, faint(TRAINING), 1)
    else:  # a run so short has no mean
        keys = [("training loss", TRAINING)]
    panel.line(steps, smooth, TRAINING, 2.5)
    if held_out:
        panel.line(*zip(*held_out), HELD_OUT, 2)
        panel.points(*zip(*held_out), HELD_OUT)
        keys.append(("held-out loss", HELD_OUT))
    canvas.legend(keys if len(losses) or held_out else [("no losses yet", FAINT)], 64, 16, title)
    return canvas.picture()


def validation_plot(history: Mapping[int, Sequence[Loss]], title: str = "held-out loss") -> Image.Image:
    """Held-out losses by training step: a panel per range of flow times, in each a line per condition.

    The 95 % intervals are shaded. The last panel is all flow times together.
    """
    history = {step: with_all(history[step]) for step in sorted(history)}
    rows = [row for step in history for row in history[step]]
    names, columns = conditions(rows), 2
    panels = bins(rows) or [ALL]
    colours = {name: LINES.get(name) or OTHERS[i % len(OTHERS)] for i, name in enumerate(names)}
    high, lines = 230, ceil(len(panels) / columns)
    canvas = Canvas(WIDTH, 40 + lines * high)
    for number, bin in enumerate(panels):
        left, top = (number % columns) * (WIDTH // columns), 40 + (number // columns) * high
        found = [row for row in rows if row.bin == bin]
        shown = [value for row in found for value in (row.mean, row.low, row.high) if isfinite(value)]
        panel = Axes(canvas, (left + 64, top + 20, left + WIDTH // columns - 14, top + high - 46), list(history), shown)
        panel.frame("step", bin if bin != ALL else "all flow times")
        series = {
            name: [(s, row) for s in history for row in history[s] if (row.condition, row.bin) == (name, bin)]
            for name in names
        }
        for name, points in series.items():
            panel.band([s for s, _ in points], [r.low for _, r in points], [r.high for _, r in points], colours[name])
        for name, points in series.items():
            panel.line([s for s, _ in points], [r.mean for _, r in points], colours[name], 2)
            panel.points([s for s, _ in points], [r.mean for _, r in points], colours[name])
    canvas.legend([(CONDITIONS.get(name, name), colours[name]) for name in names], 64, 16, title)
    return canvas.picture()


def _running_mean(losses: Sequence[float]) -> tuple[list[float], int]:
    """Exponential mean, unbiased at its start, and its length in steps."""
    span = max(1, len(losses) // 50)
    keep, total, weight, out = 1 - 1 / span, 0.0, 0.0, []
    for loss in losses:
        if isfinite(loss):
            total, weight = keep * total + loss, keep * weight + 1
        out.append(total / weight if weight else float("nan"))
    return out, span
