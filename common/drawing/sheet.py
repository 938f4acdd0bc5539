"""Contact sheets: labelled pictures side by side, whole, on one page."""

import logging
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..images import ImageError, check_values
from .palette import GREY, INK, PAPER, WIDTH
from .text import wrap, write

log = logging.getLogger(__name__)

GAP, LINE = 12, 20  # px between pictures, px a line of text
CAPTION, HEAD = 13, 14  # px of the letters
Row = tuple[str, Sequence[Image.Image]] | tuple[str, Sequence[Image.Image], Sequence[str]]


def contact_sheet(rows: Sequence[Row], side: int = 256) -> Image.Image:
    """Rows (label, pictures) or (label, pictures, captions): each row under its label, each picture over its caption.

    Pictures are fitted whole into `side` x `side` px. Line breaks in captions and labels stay; what is too long is
    wrapped, and cut after three lines of a part.
    """
    if side < 16:
        raise ValueError(f"contact_sheet: side is {side}, expected at least 16 px.")
    labels, shelves = [row[0] for row in rows], [row[1] for row in rows]
    texts = [row[2] if len(row) == 3 else () for row in rows]
    columns = max((len(pictures) for pictures in shelves), default=1)
    width = max(WIDTH, GAP + columns * (side + GAP))
    shown = [
        [ImageOps.contain(p.convert("RGB"), (side, side), Image.Resampling.LANCZOS) for p in pictures]
        for pictures in shelves
    ]
    tall = [max((picture.height for picture in pictures), default=0) for pictures in shown]
    heads = [wrap(label, width - 2 * GAP, HEAD) for label in labels]
    captions = [[wrap(caption, side, CAPTION) for caption in found] for found in texts]
    below = [LINE * max((len(lines) for lines in found), default=0) for found in captions]
    heights = [LINE * len(lines) + high + deep + 2 * GAP for lines, high, deep in zip(heads, tall, below)]
    image = Image.new("RGB", (width, max(sum(heights) + GAP, 64)), PAPER)
    pen, top = ImageDraw.Draw(image), GAP
    for lines, pictures, row, found, high, height in zip(heads, shown, texts, captions, tall, heights):
        for number, line in enumerate(lines):
            write(pen, (GAP, top + LINE * number), line, INK, HEAD)
        first = [len(wrap(text.split("\n", 1)[0], side, CAPTION)) for text in row]  # what follows a break is grey
        for column, picture in enumerate(pictures):
            x, y = GAP + column * (side + GAP), top + LINE * len(lines) + 4
            image.paste(picture, (x, y + (high - picture.height) // 2))
            for number, line in enumerate(found[column] if found else ()):
                colour = INK if number < first[column] else GREY
                write(pen, (x, y + high + 3 + LINE * number), line, colour, CAPTION)
        top += height
    return image


def labelled_sheet(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    references: Sequence[Image.Image] = (),
    title: str = "",
    columns: int = 0,
    side: int = 256,
) -> Image.Image:
    """Pictures over their labels, row by row, under a title and, if there are any, a row of references.

    With 0 columns, as many as make the sheet about square, six at most. Pictures are fitted into `side` x `side` px.
    """
    if len(labels) != len(pictures):
        raise ValueError(f"A sheet got {len(pictures)} pictures and {len(labels)} labels, expected as many of each.")
    columns = columns or min(6, max(1, round(len(pictures) ** 0.5 + 0.25)))
    rows: list[Row] = [(title, [], [])] if title else []
    for i in range(0, len(references), columns):
        rows.append(("references" if i == 0 else "", references[i : i + columns], ()))
    for i in range(0, len(pictures), columns):
        rows.append(("", pictures[i : i + columns], labels[i : i + columns]))
    return contact_sheet(rows, side)


def sheet_of_batches(
    images: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    figures: Sequence[str] | None = None,
    references: Sequence[Tensor] = (),
    **settings,
) -> Tensor:
    """The labelled sheet of a list of IMAGE batches (n, h, w, 3), as an IMAGE (1, h, w, 3).

    Labels, and figures (metrics below them), are one for each picture or one for each batch; without labels the
    pictures are numbered. A single text of figures for several pictures is put below the title. For settings see
    `labelled_sheet`. Raises ValueError for another number of texts, and where there is no picture.
    """
    pictures = [to_picture(picture) for batch in images for picture in batch]
    if not pictures:
        raise ValueError("Contact Sheet: no picture came in at images, expected at least one.")
    for name, batches in (("images", images), ("references", references)):
        for number, picture in enumerate((picture for batch in batches for picture in batch), 1):
            try:
                check_values(picture, f"picture {number} of {name}")
            except ImageError as error:  # the others are worth a sheet
                log.warning("Contact Sheet: %s", error)

    def for_each(texts: Sequence[str], name: str) -> list[str]:
        if len(texts) == len(pictures):
            return list(texts)
        if len(texts) != len(images):
            raise ValueError(
                f"Contact Sheet: {len(texts)} {name} came in for {len(pictures)} pictures in {len(images)} batches,"
                " expected one for each picture or one for each batch. Connect the labels of the node that made the"
                " list which the pictures come from."
            )
        return [text for text, batch in zip(texts, images) for _ in batch]

    captions = for_each(labels, "labels") if labels else [str(number + 1) for number in range(len(pictures))]
    if figures and len(figures) == 1 < len(pictures):
        settings["title"] = "\n".join(text for text in (settings.get("title"), figures[0]) if text)
    elif figures:
        captions = [f"{label}\n{text}" for label, text in zip(captions, for_each(figures, "figures"))]
    shown = [to_picture(picture) for batch in references for picture in batch]
    return to_tensor(labelled_sheet(pictures, captions, references=shown, **settings))


def to_picture(pixels: Tensor) -> Image.Image:
    """RGB from (h, w, 3), RGBA from (h, w, 4); values are clamped to 0..1, and what is NaN is black."""
    if pixels.shape[-1] not in (3, 4):
        raise ImageError(
            f"A picture of a sheet is {tuple(pixels.shape)}, expected (height, width, 3). ImageToMask and MaskToImage "
            "make it of one with other channels."
        )
    pixels = pixels.nan_to_num(0, 1, 0)
    return Image.fromarray((pixels.float().clamp(0, 1).cpu().numpy() * 255).round().astype("uint8"))


def to_tensor(picture: Image.Image) -> Tensor:
    """(1, h, w, 3) float32 in 0..1, the host's IMAGE."""
    return torch.from_numpy(numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255)[None]


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, h, w, 3) as `to_tensor`, smaller RGB pictures on paper at the top left of the largest's size."""
    w, h = (max(sides) for sides in zip(*(picture.size for picture in pictures)))
    return torch.cat([to_tensor(ImageOps.expand(p, (0, 0, w - p.width, h - p.height), PAPER)) for p in pictures])
