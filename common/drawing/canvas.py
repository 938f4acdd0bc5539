"""A picture to draw on, in px of the finished one."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from .palette import INK, PAPER, Colour
from .text import text_width, typeface, write

FINE = 2  # drawn at so many times the size and reduced, since Pillow's lines have jagged edges
Point = tuple[float, float]


class Canvas:
    """Paper of `width` x `height` px. Points are (x, y) from the top left, line widths and radii in px."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * FINE, height * FINE), PAPER)
        self._pen = ImageDraw.Draw(self._image)

    def picture(self) -> Image.Image:
        """What was drawn so far."""
        return self._image.reduce(FINE)

    def text(
        self, x: float, y: float, text: str, colour: Colour = INK, size: int = 12, anchor: str = "lm", paper=False
    ) -> float:
        """Writes at Pillow's `anchor`, on paper of its own if asked for, and returns the text's width."""
        at = x * FINE, y * FINE
        if paper:
            left, top, right, bottom = self._pen.textbbox(at, text, typeface(size * FINE), anchor)
            self._pen.rectangle((left - 3, top - 2, right + 3, bottom + 2), PAPER)
        write(self._pen, at, text, colour, size * FINE, anchor)
        return text_width(text, size * FINE) / FINE

    def line(self, points: Iterable[Point], colour: Colour, width: float = 1) -> None:
        """A line through the points."""
        self._pen.line(_large(points), colour, round(width * FINE), joint="curve" if width > 1 else None)

    def rectangle(
        self, box: tuple[float, float, float, float], fill: Colour | None = None, outline: Colour | None = None
    ) -> None:
        """`box` is left, top, right, bottom."""
        left, top, right, bottom = (round(edge * FINE) for edge in box)
        self._pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill, outline, FINE)

    def circle(
        self, x: float, y: float, radius: float, fill: Colour | None = None, outline: Colour | None = None
    ) -> None:
        """A disc with a fine rim, or a ring."""
        self._pen.ellipse(_box(x, y, radius), fill, outline, FINE if fill is None else 1)

    def slice(
        self, x: float, y: float, radius: float, start: float, end: float, fill: Colour, outline: Colour | None = None
    ) -> None:
        """The part of a disc between two directions, in degrees clockwise from above."""
        self._pen.pieslice(_box(x, y, radius), start - 90, end - 90, fill, outline, FINE)

    def shade(self, points: Iterable[Point], colour: Colour) -> None:
        """The area within the points, see-through."""
        mask = Image.new("L", self._image.size)
        ImageDraw.Draw(mask).polygon(_large(points), 46)
        self._image.paste(Image.new("RGB", self._image.size, colour), mask=mask)

    def legend(self, keys: Sequence[tuple[str, Colour]], x: float, y: float, title: str = "") -> None:
        """Title, then coloured keys, in one line from the left."""
        if title:
            x += self.text(x, y, title, size=13) + 24
        for name, colour in keys:
            self.circle(x + 5, y, 5, fill=colour)
            x += 16 + self.text(x + 16, y, name) + 18


def _large(points: Iterable[Point]) -> list[Point]:
    return [(x * FINE, y * FINE) for x, y in points]


def _box(x: float, y: float, radius: float) -> list[float]:
    return [value * FINE for value in (x - radius, y - radius, x + radius, y + radius)]
