"""What an MLLM's vision tower is given, and where its tokens stand: pixels and positions on every transformers.

Tensors only: the library's own preprocessing changes between releases, and features must not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# the published normalisations (RGB); part of the weights, so they are not read from a preprocessor file
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Vision:
    """What the vision tower expects: px of a patch, patches merged to a token (a side), normalisation (RGB)."""

    patch: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 2  # Qwen: a still is two equal frames

    def normalize(self, image: Tensor) -> Tensor:
        """(3, H, W) in 0..1 -> the same, normalised."""
        mean, std = image.new_tensor(self.mean), image.new_tensor(self.std)
        return (image - mean[:, None, None]) / std[:, None, None]


def qwen_pixels(
    image: Tensor, vision: Vision, least: int = 3136, most: int = 12845056
) -> tuple[Tensor, tuple[int, int]]:
    """(H, W, 3) -> patches (h w, 3 frames patch patch) ordered in merge x merge blocks, and the grid (h, w) in patches.

    Sides go to the nearest multiple of patch x merge, bilinearly, as the host's Qwen2.5-VL does.
    """
    factor = vision.patch * vision.merge
    height, width = image.shape[:2]
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    pixels = F.interpolate(image.movedim(-1, 0)[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
    pixels = vision.normalize(pixels)[None].expand(vision.frames, -1, -1, -1)
    patches = rearrange(
        pixels, "t c (h mh ph) (w mw pw) -> (h w mh mw) (c t ph pw)",
        mh=vision.merge, mw=vision.merge, ph=vision.patch, pw=vision.patch,
    )  # fmt: skip
    return patches, (rows // vision.patch, columns // vision.patch)


def internvl_tiles(image: Tensor, vision: Vision, side: int, most: int) -> Tensor:
    """(H, W, 3) -> tiles (n, 3, side, side), with a thumbnail of the whole last where there are several.

    The grid is InternVL's: the one of at most `most` tiles whose aspect is nearest the image's. InternVL then stretches
    the image to the grid; our choice is to fit it inside, aspect kept, centred on the mean colour.
    """
    height, width = image.shape[:2]
    best, gap = (1, 1), math.inf
    for columns, rows in sorted(((c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)), key=math.prod):
        difference = abs(width / height - columns / rows)
        if difference < gap or (difference == gap and height * width > 0.5 * side * side * columns * rows):
            best, gap = (columns, rows), difference
    columns, rows = best
    tiles = rearrange(
        _fit(image, vision, rows * side, columns * side), "c (r h) (k w) -> (r k) c h w", r=rows, k=columns
    )
    if len(tiles) > 1:
        tiles = torch.cat((tiles, _fit(image, vision, side, side)[None]))
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


def mrope_positions(tokens: list, grids: list[tuple[int, int]]) -> Tensor:
    """Positions (3, 1, T) in time, height and width of a text with images (None in `tokens`; grids in tokens).

    Text counts on; an image stands at one time and spans its grid; the text after it starts past its longer side.
    """
    runs, at, grid = [], 0, iter(grids)
    for token in tokens:
        if token is None:
            h, w = next(grid)
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            runs.append(torch.stack((torch.zeros_like(y), y, x)).flatten(1) + at)
            at += max(h, w)
        else:
            runs.append(torch.full((3, 1), at))
            at += 1
    return torch.cat(runs, dim=1)[:, None]
