"""Images for an MLLM's vision tower: pixels, the grid of their tokens, and positions in the decoder.

Tensors only: the library's own preprocessing changes between releases, and features must not.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...dla.features import ImageGrid


@dataclass(frozen=True)
class Vision:
    """What the vision tower expects of its input."""

    patch: int  # px, side of a patch
    merge: int  # patches a side that are merged into one token
    mean: tuple[float, ...]  # RGB, of images in 0..1
    std: tuple[float, ...]
    frames: int = 2  # Qwen: a still is two equal frames

    @property
    def token(self) -> int:
        """Side of a token in px."""
        return self.patch * self.merge

    def normalize(self, image: Tensor) -> Tensor:
        """An image (3, H, W) in 0..1, normalised."""
        mean, std = image.new_tensor(self.mean), image.new_tensor(self.std)
        return (image - mean[:, None, None]) / std[:, None, None]


def to_area(image: Tensor, side: int) -> Tensor:
    """Scales (H, W, 3) to about side x side px in area, aspect kept, as the host's TextEncodeQwenImageEditPlus does."""
    scale = math.sqrt(side * side / (image.shape[0] * image.shape[1]))
    size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    return F.interpolate(image[None].movedim(-1, 1), size=size, mode="area").movedim(1, -1)[0]


def to_long_edge(image: Tensor, side: int) -> Tensor:
    """Scales (H, W, 3) to at most `side` px on its longer edge, as the host's TextEncodeMageFlowEdit does."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = tuple(max(1, round(length * scale)) for length in image.shape[:2])
    return F.interpolate(image[None].movedim(-1, 1), size=size, mode="bicubic").movedim(1, -1)[0]


def to_square(image: Tensor, side: int) -> Tensor:
    """Stretches (H, W, 3) to side x side px, as Gemma 3's image processor does."""
    return F.interpolate(image[None].movedim(-1, 1), size=(side, side), mode="bilinear").movedim(1, -1)[0]


def qwen_grid(height: int, width: int, vision: Vision, least: int = 3136, most: int = 12845056) -> ImageGrid:
    """Token grid of an image of height x width px: sides to the nearest whole token, `least` to `most` px in all.

    Source: the host's Qwen2.5-VL.
    """
    factor = vision.token
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return ImageGrid(rows, columns)


def qwen_pixels(image: Tensor, grid: ImageGrid, vision: Vision) -> Tensor:
    """Patches (h w, 3 frames patch patch) in merge x merge blocks of an image (H, W, 3) in 0..1, scaled to its grid."""
    pixels = to_grid(image, grid, vision)[None].expand(vision.frames, -1, -1, -1)
    return rearrange(
        pixels, "t c (h mh ph) (w mw pw) -> (h w mh mw) (c t ph pw)",
        mh=vision.merge, mw=vision.merge, ph=vision.patch, pw=vision.patch,
    )  # fmt: skip


def pooled_pixels(image: Tensor, grid: ImageGrid, vision: Vision) -> tuple[Tensor, Tensor]:
    """Patches (1, h w, patch patch 3), row by row, of an image (H, W, 3) in 0..1, scaled to its grid; x, y (1, h w, 2).

    Source: Gemma 4.
    """
    pixels = to_grid(image, grid, vision)
    patches = rearrange(pixels, "c (h ph) (w pw) -> 1 (h w) (ph pw c)", ph=vision.patch, pw=vision.patch)
    rows, columns = grid.rows * vision.merge, grid.columns * vision.merge
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return patches, rearrange([x, y], "c h w -> 1 (h w) c")


def to_grid(image: Tensor, grid: ImageGrid, vision: Vision) -> Tensor:
    """Normalised pixels (3, h, w) of an image (H, W, 3), scaled to its grid."""
    size = (grid.rows * vision.token, grid.columns * vision.token)
    pixels = F.interpolate(image.movedim(-1, 0)[None], size=size, mode="bilinear", align_corners=False)
    return vision.normalize(pixels[0])


def internvl_grid(height: int, width: int, vision: Vision, side: int, most: int) -> ImageGrid:
    """Token grid of an image of height x width px cut into at most `most` tiles of side x side px.

    Of all arrangements of tiles it is the one whose aspect is nearest the image's; where there are several tiles, a
    thumbnail of the whole image follows. Source: InternVL.
    """
    best, gap = (1, 1), math.inf
    for columns, rows in sorted(((c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)), key=math.prod):
        difference = abs(width / height - columns / rows)
        if difference < gap or (difference == gap and height * width > 0.5 * side * side * columns * rows):
            best, gap = (columns, rows), difference
    columns, rows = best
    count = side // vision.token
    return ImageGrid(rows * count, columns * count, (rows, columns), thumbnail=rows * columns > 1)


def internvl_tiles(image: Tensor, grid: ImageGrid, vision: Vision) -> Tensor:
    """Tiles (n, 3, side, side) of an image (H, W, 3) in 0..1, the thumbnail last.

    InternVL stretches the image to the grid; our choice is to fit it inside, aspect kept, centred on the mean colour.
    """
    down, across = grid.tiles or (1, 1)
    height, width = grid.rows * vision.token, grid.columns * vision.token
    tiles = rearrange(_fit(image, vision, height, width), "c (r h) (k w) -> (r k) c h w", r=down, k=across)
    if grid.thumbnail:
        tiles = torch.cat((tiles, _fit(image, vision, height // down, width // across)[None]))
    return tiles


def _fit(image: Tensor, vision: Vision, rows: int, columns: int) -> Tensor:
    height, width = image.shape[:2]
    scale = min(rows / height, columns / width)
    h, w = min(rows, max(1, round(height * scale))), min(columns, max(1, round(width * scale)))
    inner = F.interpolate(image.movedim(-1, 0)[None], size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    out = image.new_zeros(3, rows, columns)  # zero is the mean colour once normalised
    top, left = (rows - h) // 2, (columns - w) // 2
    out[:, top : top + h, left : left + w] = vision.normalize(inner[0].clamp(0, 1))
    return out


def image_numbers(tokens: Sequence[int | None], grids: Iterable[ImageGrid]) -> Tensor:
    """Numbers (T,) of the images, from 1, whose tokens a text holds (None in `tokens`); 0 at its words."""
    counts = iter([grid.tokens for grid in grids])
    holes = torch.tensor([token is None for token in tokens])
    repeats = torch.tensor([next(counts) if token is None else 1 for token in tokens])
    return (holes * holes.cumsum(0)).repeat_interleave(repeats)


def mrope_positions(tokens: Sequence[int | None], grids: Iterable[ImageGrid]) -> Tensor:
    """Positions (3, 1, T) in time, height and width of a text with images (None in `tokens`).

    Text counts on; all tokens of an image have one time and span its grid; the text after it starts past its longer
    side. Source: Qwen2-VL's M-RoPE.
    """
    runs, at, grids = [], 0, iter(grids)
    for token in tokens:
        if token is None:
            grid = next(grids)
            y, x = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij")
            runs.append(torch.stack((torch.zeros_like(y), y, x)).flatten(1) + at)
            at += max(grid.rows, grid.columns)
        else:
            runs.append(torch.full((3, 1), at))
            at += 1
    return torch.cat(runs, dim=1)[:, None]
