"""The pictures that are laid on the demo's toys (decals, patterns, shadow) and behind them (places)."""

from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from .layout import SIDE
from .world import COLOURS

GROUND_AND_SKY = {
    "on grass": ((110, 175, 80), (175, 215, 245)), "on sand": ((225, 200, 150), (150, 205, 240)),
    "in the snow": ((235, 240, 248), (195, 210, 225)), "on a road": ((95, 95, 100), (170, 190, 200)),
    "at night": ((40, 45, 60), (12, 14, 40)),
}  # fmt: skip


def pattern(name: str) -> Image.Image:
    """64 x 64 px of "striped" or "checked", white and grey: it darkens the body's colour, and repeats."""
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    draw = ImageDraw.Draw(image)
    columns = ((0, 0), (32, 0)) if name == "striped" else ((0, 0), (16, 16), (32, 0), (48, 16))
    for x, offset in columns:
        for y in range(0, 64, 64 if name == "striped" else 32):
            bottom = 63 if name == "striped" else y + offset + 15
            draw.rectangle((x, y + offset, x + 15, bottom), fill=(130, 130, 130, 255))
    return image


def decal(name: str, colour: str) -> Image.Image:
    """64 x 64 px of one of world.DECALS, transparent around."""
    clear, fill = (*COLOURS[colour], 0), (*COLOURS[colour], 255)
    image = Image.new("RGBA", (64, 64), clear)
    draw = ImageDraw.Draw(image)
    if name == "star":
        radii = [31 if i % 2 == 0 else 13 for i in range(10)]
        draw.polygon([(32 + r * sin(i * pi / 5), 34 - r * cos(i * pi / 5)) for i, r in enumerate(radii)], fill=fill)
    elif name == "disc":
        draw.ellipse((5, 5, 59, 59), fill=fill)
    elif name == "cross":
        draw.rectangle((22, 2, 42, 62), fill=fill)
        draw.rectangle((2, 22, 62, 42), fill=fill)
    elif name == "ring":
        draw.ellipse((2, 2, 62, 62), fill=fill)
        draw.ellipse((18, 18, 46, 46), fill=clear)
    elif name == "triangle":
        draw.polygon([(32, 3), (62, 59), (2, 59)], fill=fill)
    else:  # heart
        draw.ellipse((2, 6, 34, 38), fill=fill)
        draw.ellipse((30, 6, 62, 38), fill=fill)
        draw.polygon([(4, 30), (60, 30), (32, 62)], fill=fill)
    return image


def shadow() -> Image.Image:
    """64 x 64 px of black whose opacity falls from the middle."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 3] = np.clip(1.25 - (x**4 + y**4) ** 0.5 * 1.3, 0, 0.45) * 255
    return Image.fromarray(image, "RGBA")


def background(place: str, polar: float, seed: int) -> Image.Image:
    """SIDE x SIDE px: ground up to a horizon that sinks with the camera's elevation (degrees), and sky."""
    draw = np.random.default_rng(seed)
    ground, sky = GROUND_AND_SKY.get(place) or (COLOURS[place.split()[2]], (205, 195, 180))
    rows = np.arange(SIDE)[:, None, None]
    horizon = SIDE * (0.62 - polar / 60)
    out = np.where(rows < horizon, np.array(sky, float), np.array(ground, float) * (0.9 + 0.1 * rows / SIDE))
    out = np.broadcast_to(out, (SIDE, SIDE, 3)).copy()
    noise = Image.fromarray(draw.normal(0, 1, (8, 8)).astype(np.float32)).resize((SIDE, SIDE), Image.BICUBIC)
    out += 6 * np.asarray(noise)[..., None] * (rows >= horizon)
    if place == "on a road":
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        out[(y > horizon) & (abs(y - SIDE * 0.93) < 2) & (x // 14 % 2 == 0)] = (230, 230, 220)
    if place == "at night":
        for y, x in draw.integers(0, SIDE, (14, 2)):
            if y < horizon - 1:
                out[y, x] = (230, 230, 200)
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8), "RGB")
