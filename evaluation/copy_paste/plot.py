"""The copy-paste metrics as a figure: where references and outputs face, how far the outputs turned, the table."""

from math import ceil, cos, radians, sin, sqrt

import torch
from PIL import Image

from ...common.drawing.canvas import Canvas, Point
from ...common.drawing.palette import BLUE, GREY, GRID, INK, ORANGE, PAPER, faint
from .metrics import Pairs
from .report import cell, coverage, rows

WIDTH, PANEL, TOP = 900, 450, 84  # px: the figure, one of its two panels, their top
LINE, RADIUS = 22, 158  # px: a line of the table, a panel's circle
REFERENCE, OUTPUT, FLOOR = BLUE, ORANGE, GREY
WEDGE = faint(ORANGE, 0.15)
BIN = 10  # degrees


def report_plot(outputs: Pairs, floor: Pairs, model: str) -> Image.Image:
    """RGB, 900 px wide.

    Left: the subject seen from above with the camera below it, azimuth as direction and polar as distance from the
    zenith, a line from each reference to its output. Right: share of outputs by how far they turned away from their
    reference, area for area, the floor in grey. Below: the table of metrics.
    """
    height = TOP + 2 * RADIUS + 56 + 5 * LINE + 34
    canvas = Canvas(WIDTH, height)
    canvas.text(24, 22, f"Copy-paste. {coverage(outputs)}", size=14)
    _facing(canvas, PANEL / 2, TOP + RADIUS, outputs)
    _turned(canvas, PANEL * 1.5, TOP + RADIUS, outputs, floor)
    _table(canvas, TOP + 2 * RADIUS + 56, outputs, floor)
    canvas.text(24, height - 20, f"orientation by {model}", GREY)
    return canvas.picture()


def _facing(canvas: Canvas, x: float, y: float, outputs: Pairs) -> None:
    lowest = min(float(outputs.reference[:, 1].min()), float(outputs.generated[:, 1].min()), -29.0)
    lowest = -30 * ceil(-lowest / 30)

    def at(azimuth: float, polar: float) -> Point:
        """0 faces the camera, below; 90 faces the left of the picture."""
        distance = RADIUS * min(max(90 - polar, 0) / (90 - lowest), 1)
        return x - distance * sin(radians(azimuth)), y + distance * cos(radians(azimuth))

    for polar in range(60, lowest - 1, -30):
        canvas.circle(x, y, RADIUS * (90 - polar) / (90 - lowest), outline=GREY if polar == 0 else GRID)
    for azimuth in range(0, 360, 45):
        canvas.line([(x, y), at(azimuth, lowest)], GRID)
    for polar in range(60, lowest - 1, -30):
        canvas.text(*at(202, polar), f"{polar}°", GREY, 11, "mm", paper=True)
    canvas.text(x, y + RADIUS + 14, "0° facing the camera", GREY, anchor="mm")
    canvas.text(x, y - RADIUS - 14, "180°", GREY, anchor="mm")
    canvas.text(x - RADIUS - 8, y, "90°", GREY, anchor="rm")
    canvas.text(x + RADIUS + 8, y, "270°", GREY)
    size = 5 if len(outputs.reference) <= 100 else 3
    ordered = sorted(zip(outputs.report.counted.tolist(), outputs.reference.tolist(), outputs.generated.tolist()))
    for counted, reference, generated in ordered:  # those that do not count are drawn first, below
        canvas.line([at(*reference[:2]), at(*generated[:2])], faint(INK, 0.5 if counted else 0.18))
    for counted, reference, generated in ordered:
        for (azimuth, polar, _), colour in ((generated, OUTPUT), (reference, REFERENCE)):
            canvas.circle(*at(azimuth, polar), size, fill=colour if counted else faint(colour), outline=PAPER)
    canvas.legend([("reference", REFERENCE), ("output", OUTPUT), ("low confidence", faint(INK))], 24, TOP - 34)


def _turned(canvas: Canvas, x: float, y: float, outputs: Pairs, floor: Pairs) -> None:
    canvas.slice(x, y, RADIUS, -20, 20, WEDGE)
    shares = {name: _shares(pairs) for name, pairs in (("outputs", outputs), ("floor", floor))}
    most = max(max(found) for found in shares.values())
    for part in (0.25, 0.5, 1.0):
        canvas.circle(x, y, RADIUS * sqrt(part), outline=GRID)
    for turn in range(0, 360, 45):
        canvas.line([(x, y), _direction(x, y, RADIUS, turn)], GRID)
    for number, share in enumerate(shares["outputs"]):
        if share:
            radius = RADIUS * sqrt(share / most)
            canvas.slice(x, y, radius, BIN * (number - 0.5), BIN * (number + 0.5), OUTPUT, PAPER)
    outline = []
    for number, share in enumerate(shares["floor"]):
        radius = RADIUS * sqrt(share / most) if most else 0
        outline += [_direction(x, y, radius, BIN * (number + side)) for side in (-0.5, -0.25, 0, 0.25, 0.5)]
    if max(shares["floor"]):
        canvas.line([*outline, outline[0]], FLOOR, 1.5)
    for part in (0.25, 0.5, 1.0) if most else ():
        position = _direction(x, y, RADIUS * sqrt(part), 157)
        canvas.text(*position, f"{100 * part * most:.3g} %", GREY, 11, "mm", paper=True)
    if not outputs.report.count:
        canvas.text(x, y, "no pair counts", INK, 13, "mm", paper=True)
    canvas.text(x, y - RADIUS - 14, "0° as in the reference", GREY, anchor="mm")
    canvas.text(x, y + RADIUS + 14, "180°", GREY, anchor="mm")
    canvas.text(x + RADIUS + 8, y, "+90°", GREY)
    canvas.text(x - RADIUS - 8, y, "-90°", GREY, anchor="rm")
    keys = [("azimuth turned", OUTPUT), ("floor", FLOOR), ("recall's limit of 20°", WEDGE)]
    canvas.legend(keys, PANEL + 24, TOP - 34)


def _table(canvas: Canvas, top: float, outputs: Pairs, floor: Pairs) -> None:
    columns = (24, 190, 370, 550, 760)
    for left, title in zip(columns, ("", "azimuth difference", "polar difference", "average recall", "pairs")):
        canvas.text(left, top, title, GREY, 13)
    for number, (name, metrics) in enumerate(rows(outputs, floor), 1):
        cells = [cell(metrics, key) for key in ("azimuth", "polar", "average_recall")]
        for left, text in zip(columns, (name, *cells, str(metrics.count))):
            canvas.text(left, top + number * LINE, text, GREY if "ungated" in name else INK, 13)
        canvas.line([(24, top + (number - 0.5) * LINE), (WIDTH - 24, top + (number - 0.5) * LINE)], GRID)


def _shares(pairs: Pairs) -> list[float]:
    """Share of the pairs that count by signed azimuth difference, in bins about 0, BIN, 2 BIN ... degrees."""
    turn = (pairs.generated[:, 0] - pairs.reference[:, 0])[pairs.report.counted]
    number = ((turn + BIN / 2) % 360 / BIN).long().clamp(max=360 // BIN - 1)
    return (torch.bincount(number, minlength=360 // BIN) / max(len(turn), 1)).tolist()


def _direction(x: float, y: float, radius: float, turn: float) -> Point:
    """0 is up, positive is clockwise."""
    return x + radius * sin(radians(turn)), y - radius * cos(radians(turn))
