"""Colours and the typeface of every picture that the pack draws."""

from PIL import ImageFont

WIDTH = 768  # px of a plot or a sheet
INK, GREY, FAINT, PAPER = (40, 40, 46), (110, 110, 118), (205, 205, 212), (252, 252, 253)
GRID = (232, 232, 237)
COLOURS = {"mllm": (86, 130, 214), "vae": (222, 140, 62)}  # the token groups; also any pair of series


def typeface(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font in `size` px."""
    return ImageFont.load_default(size)


def faint(colour: tuple[int, ...], share: float = 0.35) -> tuple[int, ...]:
    """`colour` mixed with the paper; `share` of it stays."""
    return tuple(round(share * c + (1 - share) * p) for c, p in zip(colour, PAPER, strict=True))
