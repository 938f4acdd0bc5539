"""Figures of layer weights: heat maps by token and layer, and overlays on the reference image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..common.drawing.palette import BLUE, COLD, FAINT, GREY, HEAT, INK, ORANGE, PAPER, WIDTH
from ..common.drawing.sheet import to_batch, to_picture, to_tensor
from ..common.drawing.text import typeface
from ..dla.context import kept_tokens
from ..dla.features import Features, ImageGrid, Modality
from .layer_weights import MODALITIES, LayerWeights, describe

if TYPE_CHECKING:
    from ..loaders.dla import DLA

LEFT, RIGHT, TOP = 64, 20, 30  # px around a panel
BARS, ROWS, TOKEN = 70, 240, 8  # px: height of the mean profile, most for the tokens, most for one token
SIDE = 768  # px, longest side of an overlay


def draw_layer_weights(
    features: Features, dla: DLA, picture: Tensor | None = None, index: int = 0, layer: int | None = None
) -> tuple[Tensor, Tensor | None, str]:
    """Heat maps, overlays and a description of the weights that a DLA gives to layers in these features.

    Args:
        features: Of B prompts.
        dla: The DLA that pools them.
        picture: Reference image (H, W, 3) in 0..1 as the MLLM read it; None = no overlays.
        index: Its 0-based number among the reference images.
        layer: Number of the layer whose weight the overlay shows; None = each token's mean layer.

    Returns:
        Heat maps (B, h, w, 3) in 0..1, overlays (B, h, w, 3) in 0..1 or None, text. For errors see `overlay`.
    """
    kept = kept_tokens(features, dla.config.template)
    grids = features.grids or [None] * len(kept)
    by_token = (dla.layer_weights(features), kept, features.modality, features.image_index)
    rows = zip(*(value.cpu() for value in by_token), grids)
    prompts = [LayerWeights(row, dla.config.pooled_layers, *rest, features.info, grid) for row, *rest, grid in rows]
    overlays = None if picture is None else torch.cat([to_tensor(overlay(p, picture, index, layer)) for p in prompts])
    maps = to_batch([heat_map(prompt) for prompt in prompts])
    return maps, overlays, "\n\n".join(describe(prompt, dla.name) for prompt in prompts)


def heat_map(found: LayerWeights) -> Image.Image:
    """A panel for text and one for image tokens: bars of each layer's mean weight, below them the weights by token.

    Every token has a line of its own; where there are many, several share one.
    """
    panels = [(kind, weights) for kind in (Modality.TEXT, Modality.IMAGE) if len(weights := found.of(kind))]
    rows = [max(1, min(ROWS, TOKEN * len(weights))) for _, weights in panels]
    high = sum(TOP + BARS + 10 + count + 52 for count in rows) + 10
    image = Image.new("RGB", (WIDTH, max(high, 96)), PAPER)
    pen, top = ImageDraw.Draw(image), 8
    if not panels:
        pen.text((LEFT, 34), "no text or image tokens", INK, typeface(14))
    for (kind, weights), height in zip(panels, rows):
        top = _panel(image, pen, top + TOP, height, found, kind, weights)
    return image


def _panel(image, pen, top: int, height: int, found: LayerWeights, kind: Modality, weights: Tensor) -> int:
    """Draws one modality from `top` on and returns its lower end in px."""
    count, small, edges = len(found.layers), typeface(12), column_edges(len(found.layers))
    tokens = f"{len(weights)} {MODALITIES[kind]} token{'s' * (len(weights) != 1)}"
    pen.text((LEFT, top - 12), f"{tokens}: weight of each layer", INK, typeface(14), anchor="lm")
    mean = weights.mean(dim=0)
    low, high = min(0.0, float(mean.min())), max(0.0, float(mean.max()))
    span = max(high - low, 1e-9)
    zero = top + BARS * (high / span)
    for column, value in enumerate(mean.tolist()):
        y = zero - BARS * value / span
        fill = BLUE if value >= 0 else ORANGE
        pen.rectangle((edges[column] + 1, min(y, zero), edges[column + 1] - 2, max(y, zero)), fill)
    pen.line((LEFT, zero, WIDTH - RIGHT, zero), FAINT)
    pen.text((LEFT - 7, top), f"{high:.3g}", GREY, small, anchor="rm")
    pen.text((LEFT - 7, top + BARS), f"{low:.3g}", GREY, small, anchor="rm")
    pen.text((LEFT - 7, top + BARS / 2), "mean", INK, small, anchor="rm")

    top += BARS + 10
    largest = float(weights.abs().max()) or 1.0
    lines = torch.nn.functional.adaptive_avg_pool1d(weights.T[None], min(height, len(weights)))[0].T
    cells = Image.fromarray(heat_colours(lines / largest))
    for column in range(count):
        box = (edges[column], top, edges[column + 1], top + height)
        strip = cells.crop((column, 0, column + 1, cells.height))
        image.paste(strip.resize((box[2] - box[0], height), Image.Resampling.NEAREST), box[:2])
    pen.rectangle((LEFT, top, WIDTH - RIGHT, top + height), outline=FAINT)
    pen.text((LEFT - 7, top + height / 2), "tokens", INK, small, anchor="rm")
    bottom, every = top + height + 12, max(1, -(-count // 30))
    for column in range(0, count, every):
        pen.text(((edges[column] + edges[column + 1]) / 2, bottom), str(found.layers[column]), GREY, small, anchor="mm")
    pen.text((LEFT - 7, bottom), "layer", GREY, small, anchor="rm")
    _scale(image, pen, WIDTH - RIGHT - 260, bottom + 10, 260, min(0.0, float(weights.min())) and -largest, largest)
    return bottom + 30


def column_edges(count: int) -> list[int]:
    """Edges of `count` columns across a panel, x in px."""
    return [LEFT + round(i * (WIDTH - RIGHT - LEFT) / count) for i in range(count + 1)]


def _scale(image, pen, left: int, top: int, width: int, low: float, high: float, signed: bool = True) -> None:
    """A bar of the colours from `low` to `high`, with the numbers at both ends."""
    small = typeface(12)
    bar = width - 120
    values = torch.linspace(low / max(abs(high), 1e-12) if signed else 0.0, 1.0, bar)
    image.paste(Image.fromarray(heat_colours(values[None].expand(10, -1))), (left + 60, top + 2))
    pen.rectangle((left + 60, top + 2, left + 60 + bar, top + 12), outline=FAINT)
    pen.text((left + 54, top + 7), f"{low:.3g}", GREY, small, anchor="rm")
    pen.text((left + 66 + bar, top + 7), f"{high:.3g}", GREY, small, anchor="lm")


def heat_colours(values: Tensor) -> numpy.ndarray:
    """Colours (h, w, 3) uint8 of values (h, w) in -1..1: HEAT above zero, COLD below."""
    values = values.double().clamp(-1, 1).numpy()
    out = numpy.empty((*values.shape, 3))
    for channel in range(3):
        warm = numpy.interp(values, numpy.linspace(0, 1, len(HEAT)), [c[channel] for c in HEAT])
        cold = numpy.interp(-values, numpy.linspace(0, 1, len(COLD)), [c[channel] for c in COLD])
        out[..., channel] = numpy.where(values < 0, cold, warm)
    return out.round().astype(numpy.uint8)


@dataclass(frozen=True)
class Placement:
    """Area of a picture that an image's tokens cover."""

    order: Tensor  # (rows, columns), token numbers
    box: tuple[float, float, float, float]  # left, top, right, bottom in px; beyond the picture where it has borders

    def over(self, values: Tensor, width: int, height: int) -> Tensor:
        """Values (height, width) by pixel, each that of the token that covers it; `values` (n,) by token."""
        grid, (left, top, right, bottom) = values[self.order], self.box
        rows, columns = grid.shape
        y = ((torch.arange(height) + 0.5 - top) / (bottom - top) * rows).long().clamp(0, rows - 1)
        x = ((torch.arange(width) + 0.5 - left) / (right - left) * columns).long().clamp(0, columns - 1)
        return grid[y][:, x]


def place(grid: ImageGrid, width: int, height: int) -> Placement:
    """Placement of an image's tokens on a picture of width x height px.

    Raises ValueError where the MLLM would have read such a picture as another grid.
    """
    rows, columns, w, h = grid.rows, grid.columns, width, height
    if grid.tiles:  # the whole picture was fitted into them, centred
        down, across = grid.tiles
        scale = min(across / width, down / height)  # tiles per px
        w, h = across / scale, down / scale
        fits = abs(width / height - across / down) <= abs(width / height - 1)  # or InternVL had taken one tile
    else:
        slack = 0.55  # each side was rounded to whole tokens (and to whole px before)
        narrow = (rows - slack) / height > (columns + slack) / width
        fits = not narrow and (columns - slack) / width <= (rows + slack) / height
    if not fits:
        raise ValueError(
            f"Layer Weights: the MLLM read this reference as {columns} x {rows} tokens, which cannot be a picture of"
            f" {width} x {height} px. Connect the very picture that Encode Subject read, and set image_number to its"
            " number there."
        )
    return Placement(grid.raster(), ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2))


def overlay(found: LayerWeights, picture: Tensor, index: int = 0, layer: int | None = None) -> Image.Image:
    """A reference image in grey under the colours of its tokens, with a scale below; its longest side is 768 px.

    picture, index, layer: see draw_layer_weights. Raises ValueError for a layer that the DLA does not pool, features
    without token grids, or a picture that the tokens are not of.
    """
    weights = found.image(index)
    if layer is None:
        values, title = found.mean_layer(weights), "mean layer"
    elif layer in found.layers:
        values, title = weights[:, found.layers.index(layer)], f"weight of layer {layer}"
    else:
        raise ValueError(
            f"Layer Weights: layer {layer} is not pooled by this DLA, which pools {', '.join(map(str, found.layers))}. "
            "Choose one of them, or -1 for the mean layer."
        )
    if found.grids is None:
        raise ValueError(
            "Layer Weights: these features do not record the grid of their image tokens (version 0.1.0 or another node"
            " made them), so nothing can be laid over the image. Encode again with Encode Subject, or leave image open."
        )
    height, width = picture.shape[:2]
    placement = place(found.grids[index], width, height)
    low, high = float(values.min()), float(values.max())
    shares = (values - low) / max(high - low, 1e-12) if layer is None or low >= 0 else values / max(abs(low), abs(high))
    scale = SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = to_picture(picture).convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    over = placement.over(shares, width, height)
    heat = Image.fromarray(heat_colours(over)).resize(size, Image.Resampling.NEAREST)
    image = Image.new("RGB", (max(size[0], 420), size[1] + 34), PAPER)
    image.paste(Image.blend(grey, heat, 0.6), (0, 0))
    pen = ImageDraw.Draw(image)
    pen.text((8, size[1] + 17), f"{title}, image {index + 1}", INK, typeface(14), anchor="lm")
    if high - low < 1e-6:
        pen.text((image.width - 12, size[1] + 17), f"{high:.3g} at every token", GREY, typeface(12), anchor="rm")
    else:
        signed = layer is not None and low < 0
        top = max(abs(low), abs(high)) if signed else high
        _scale(image, pen, image.width - 266, size[1] + 10, 260, -top if signed else low, top, signed)
    return image
