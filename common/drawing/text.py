"""Text of any script: each letter in the first font that has it."""

import logging
from bisect import bisect_right
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from PIL import ImageDraw, ImageFont

from .palette import INK, Colour

log = logging.getLogger(__name__)

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONTS = Path(__file__).with_name("fonts")
# Pillow's own font has ASCII, ours most alphabets and the usual letters of Chinese, Japanese and Korean. Then those
# that systems have under these names.
OURS = tuple(str(FONTS / f"{name}-subset.ttf") for name in ("DejaVuSans", "DroidSansFallback"))
OF_SYSTEMS = (
    "NotoSansCJK-Regular.ttc", "NotoSansThai-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansBengali-Regular.ttf", "NotoSansTamil-Regular.ttf", "NotoSans-Regular.ttf", "FreeSans.ttf",
    "NotoSansSymbols2-Regular.ttf", "unifont.otf", "msyh.ttc", "Nirmala.ttc", "LeelawUI.ttf", "seguisym.ttf",
    "arial.ttf", "Nirmala.ttf", "Arial Unicode.ttf", "PingFang.ttc", "Kohinoor.ttc", "Thonburi.ttc",
)  # fmt: skip


def typeface(size: int) -> Font:
    """Pillow's own font in `size` px."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """Px that a line of text takes at `size` px."""
    return sum(font.getlength(part) for part, font in _runs(text, size))


def write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: Colour = INK, size: int = 12, anchor="la"
) -> None:
    """Writes a line at Pillow's `anchor`: l, m or r, then a, m or s."""
    (x, y), runs = at, _runs(text, size)
    if len(runs) > 1:  # on one baseline, that of the first font
        ascent, descent = typeface(size).getmetrics()
        x -= text_width(text, size) * {"l": 0, "m": 0.5, "r": 1}[anchor[0]]
        y += {"a": ascent, "m": (ascent - descent) / 2, "s": 0}[anchor[1]]
        anchor = "ls"
    for part, font in runs:
        pen.text((x, y), part, colour, font, anchor=anchor)
        x += font.getlength(part)


def wrap(text: str, width: float, size: int, most: int = 3, parts: int = 16) -> list[str]:
    """Every part between line breaks in at most `most` lines of at most `width` px.

    A word that is wider, as a sentence of Chinese is, breaks at any letter. What is longer ends in dots; so does the
    text after `parts` line breaks.
    """
    found = text.split("\n", parts)
    lines = [line for part in found[:parts] for line in _wrapped(part, width, size, most)]
    return [*lines, "..."] if len(found) > parts else lines


def _wrapped(text: str, width: float, size: int, most: int) -> list[str]:
    lines, rest = [""], text[: most * max(int(width), 1)].split()  # a letter has a px at least
    while rest and len(lines) <= most:
        word = rest.pop(0)
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append("")
            rest.insert(0, word)
        else:
            fits = max(1, bisect_right(range(1, len(word)), width, key=lambda n: text_width(word[:n], size)))
            lines[-1] = word[:fits]
            rest[:0] = [word[fits:]] if word[fits:] else []
            lines += [""] if rest else []
    if len(lines) > most:
        last = lines[most - 1]
        while last and text_width(f"{last}...", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}..."]
    return [line for line in lines if line]


def _runs(text: str, size: int) -> list[tuple[str, Font]]:
    """A text in parts, each with its font."""
    if text.isascii():
        return [(text, typeface(size))]
    names: list[str] = []
    for letter in text:
        before = names[-1] if names else ""
        names.append(before if before and _has(before, letter) else _font_of(letter))
    parts = groupby(zip(text, names), lambda pair: pair[1])
    return [("".join(letter for letter, _ in part), _font(name, size)) for name, part in parts]


@lru_cache(maxsize=4096)
def _font_of(letter: str) -> str:
    """Name of the first font with the letter; "", Pillow's own, where none has it."""
    found = next((name for name in ("", *OURS, *OF_SYSTEMS) if _has(name, letter)), None)
    if found is None:
        log.warning("No font here has the letter %r: a box is drawn. Install one that does, e.g. Noto Sans.", letter)
    return found or ""


@lru_cache(maxsize=4096)
def _has(name: str, letter: str) -> bool:
    """Whether the font is here, and draws the letter otherwise than what stands for missing ones."""
    try:
        font = _font(name, 16)
    except OSError:
        return False
    one, missing = font.getmask(letter), font.getmask("\U0010ffff")
    return one.size != missing.size or bytes(one) != bytes(missing)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font:
    return ImageFont.truetype(name, size) if name else typeface(size)
