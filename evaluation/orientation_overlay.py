"""A subject's axes drawn over its picture, from its orientation (see loaders/orient_anything/network.py)."""

from collections.abc import Sequence
from math import cos, hypot, radians, sin

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..common.drawing.palette import AXES, INK, MID, PAPER
from ..common.drawing.text import typeface
from ..common.masks import fit_mask, shown_box
from ..loaders.orient_anything.network import Angles

CLEAR = 0.5  # confidence below this: no meaningful front (published)
OVERLAY = (512, 1024)  # px; least and most of an overlay's longest side
FINE = 2  # drawn at so many times the size and reduced, since Pillow's lines have jagged edges
UNCLEAR = ": no clear front"


def axes(azimuth: float, polar: float, rotation: float) -> Tensor:
    """(3, 3) of the subject's front, its own right and its top (rows), in parallel projection; angles in degrees.

    Columns: how far each points to the right of the picture, up in it, and towards the camera.
    """
    a, p, r = map(radians, (azimuth, polar, rotation))
    front = [-sin(a), -cos(a) * sin(p), cos(a) * cos(p)]
    right = [-cos(a), sin(a) * sin(p), -sin(a) * cos(p)]
    upright = torch.tensor([front, right, [0.0, cos(p), sin(p)]])
    turn = torch.tensor([[cos(r), sin(r), 0.0], [-sin(r), cos(r), 0.0], [0.0, 0.0, 1.0]])  # counter-clockwise
    return upright @ turn


def overlay(
    image: Tensor,
    angles: tuple[float, float, float, float],
    mask: Tensor | None = None,
    *,
    threshold: float = CLEAR,
) -> Image.Image:
    """The axes over the picture: red to the subject's front, green to its own right, blue to its top; angles below.

    A dot is an arrow that points at the camera, a cross one that points away. The longest side is from 512 to 1024 px
    without the lines of text; pictures (H, W, 3) in 0..1 of one size give overlays of one size.

    angles: azimuth, polar, rotation in degrees, confidence; below `threshold` the axes are grey. mask: (h, w) of any
    size, 1 = subject; the axes begin in the middle of what it shows.
    """
    azimuth, polar, rotation, confidence = angles
    height, width, _ = image.shape
    scale = min(max(1.0, OVERLAY[0] / max(height, width)), OVERLAY[1] / max(height, width)) * FINE
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    mask = None if mask is None else fit_mask(mask.cpu(), image.cpu())
    top, bottom, left, right = shown_box(mask, image)
    if mask is not None:
        pixels = (pixels * (0.35 + 0.65 * mask[..., None].numpy())).astype(numpy.uint8)  # what is cut away, darker
    text = 15 * FINE
    font = typeface(text)
    lines = [f"azimuth {azimuth:.0f}, polar {polar:.0f}, rotation {rotation:.0f}"]
    lines += [f"confidence {confidence:.2f}" + (UNCLEAR if confidence < threshold else "")]
    longest = f"azimuth 000, polar -00, rotation -000, confidence 0.00{UNCLEAR}"  # as many lines for all pictures
    if font.getlength(longest) < size[0] - text:
        lines = [", ".join(lines)]
    result = Image.new("RGB", (size[0], size[1] + int(text * (0.6 + 1.25 * len(lines)))), PAPER)
    result.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    pen = ImageDraw.Draw(result)
    centre = (left + right) / 2 * scale, (top + bottom) / 2 * scale
    length = max(0.45 * max(bottom - top, right - left) * scale, 40 * FINE)
    length = min(length, 0.42 * min(size))  # stays inside
    arrows = list(zip(axes(azimuth, polar, rotation).tolist(), AXES.items()))
    arrows.sort(key=lambda arrow: (_seen(arrow[0]) < 0.15, arrow[0][2]))  # farthest first, those along the view last
    for (x, y, near), (_, colour) in arrows:
        tip = centre[0] + x * length, centre[1] - y * length
        _arrow(pen, centre, tip, near, length, colour if confidence >= threshold else MID)
    for axis, (name, _) in arrows:
        x, y = axis[0] * length, axis[1] * length
        beyond = 1 + 0.12 / max(_seen(axis), 0.4)
        label = centre[0] + x * beyond, centre[1] - y * beyond + (1.3 * text if _seen(axis) < 0.15 else 0)
        label = tuple(min(max(at, 1.5 * text), side - 1.5 * text) for at, side in zip(label, size))
        pen.text(label, name, PAPER, font, anchor="mm", stroke_width=2 * FINE, stroke_fill=INK)
    for number, line in enumerate(lines):
        pen.text((text // 2, size[1] + text * (0.4 + 1.25 * number)), line, INK, font)
    return result.reduce(FINE)


def overlays(images: list[Tensor], angles: Angles, masks: Sequence | None = None, **options) -> Tensor:
    """`overlay` of N pictures of one size as an IMAGE (N, h, w, 3) in 0..1."""
    drawn = [
        numpy.asarray(overlay(image, found, mask, **options))
        for image, found, mask in zip(images, angles.rows(), masks or [None] * len(images))
    ]
    return torch.from_numpy(numpy.stack(drawn)).float() / 255


def _seen(axis: list[float]) -> float:
    """Length of a unit axis in the picture."""
    return hypot(axis[0], axis[1])


def _arrow(pen: ImageDraw.ImageDraw, start, end, near: float, length: float, colour) -> None:
    """An arrow of full length `length`, seen shortened, edged in white; a disc where it points along the view."""
    thick = max(length * 0.045, 2.5 * FINE)
    x, y = end[0] - start[0], end[1] - start[1]
    seen = (x * x + y * y) ** 0.5
    head = 3.2 * thick
    if seen < head:
        for radius, fill in ((2.0 * thick, PAPER), (1.7 * thick, colour)):
            pen.ellipse((end[0] - radius, end[1] - radius, end[0] + radius, end[1] + radius), fill)
        arm = 0.6 * thick
        if near > 0:
            pen.ellipse((end[0] - arm, end[1] - arm, end[0] + arm, end[1] + arm), PAPER)
        else:
            for sign in (1, -1):
                line = (end[0] - arm, end[1] - sign * arm, end[0] + arm, end[1] + sign * arm)
                pen.line(line, PAPER, round(0.4 * thick))
        return
    x, y = x / seen, y / seen
    for edge, fill in ((0.3 * thick, PAPER), (0.0, colour)):
        neck = end[0] - head * x, end[1] - head * y
        half = 1.5 * thick + 1.6 * edge
        tip = end[0] + 1.8 * edge * x, end[1] + 1.8 * edge * y
        back = neck[0] - edge * x, neck[1] - edge * y
        wings = [(back[0] - sign * half * y, back[1] + sign * half * x) for sign in (1, -1)]
        pen.line((*start, *neck), fill, round(thick + 2 * edge))
        pen.ellipse([at + sign * (thick / 2 + edge) for sign in (-1, 1) for at in start], fill)
        pen.polygon([tip, *wings], fill)
