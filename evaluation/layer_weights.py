"""What a DLA's pooling attends to: heat maps over layers, and over the reference picture whose tokens they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..common.drawing.palette import BLUE, FAINT, GREY, INK, ORANGE, PAPER, WIDTH, typeface
from ..common.drawing.sheet import to_picture, to_tensor
from ..dla.ablation import groups
from ..dla.context import kept_tokens
from ..dla.features import Features, MLLMInfo, Modality

LEFT, RIGHT, TOP = 64, 20, 30  # px around a panel
BARS, ROWS, TOKEN = 70, 240, 8  # px: height of the mean profile, most for the tokens, most for one token
SIDE = 768  # px, longest side of an overlay
TILE = 16  # tokens a side of an InternVL tile at its default size
MODALITIES = {Modality.TEXT: "text", Modality.IMAGE: "image", Modality.TEMPLATE: "template"}
# From nothing to much: light yellow, orange, red, near black; below nothing: blue. Our choice.
HEAT = ((252, 252, 253), (253, 220, 140), (244, 140, 62), (190, 50, 70), (60, 15, 60))
COLD = (252, 252, 253), (120, 170, 225), (30, 70, 150)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one prompt's pooling. Every token that the DLA passes on has a row; T tokens, M pooled layers."""

    weights: Tensor  # (T, M) fp32, rows of tokens that are not passed on are zero
    layers: tuple[int, ...]  # layer numbers of the columns
    kept: Tensor  # (T,) bool, tokens that are passed on
    modality: Tensor  # (T,) uint8, Modality
    image_index: Tensor  # (T,) int16
    info: MLLMInfo  # of the MLLM: says where its image tokens lie

    def of(self, modality: Modality) -> Tensor:
        """(n, M): the passed-on tokens of a modality, in their order."""
        return self.weights[self.kept & (self.modality == modality)]

    def mean_layer(self, weights: Tensor) -> Tensor:
        """(n, M) -> (n,): layer numbers averaged by the weights' magnitudes, which is their centre of gravity."""
        size = weights.abs()
        numbers = torch.tensor(self.layers, dtype=size.dtype, device=size.device)
        return (size * numbers).sum(dim=1) / size.sum(dim=1).clamp(min=1e-12)

    def image(self, index: int) -> Tensor:
        """(n, M): every token of reference image `index` (0-based). Raises ValueError where the DLA reads none."""
        there = self.image_index == index
        if not bool((there & self.kept).any()):
            count = int(self.image_index.max()) + 1
            raise ValueError(
                f"Layer Weights: reference image {index + 1} has no token in these features, which hold {count}"
                " reference image(s). Set image_number to one of them, in the order of Encode Subject's inputs."
            )
        return self.weights[there]


def layer_weights(features: Features, weights: Tensor, layers: Sequence[int], kept: Tensor) -> list[LayerWeights]:
    """One LayerWeights per prompt. weights: (B, T, M) from DualLayerAggregator.layer_weights; kept: (B, T) bool."""
    rows = zip(weights.cpu(), kept.cpu(), features.modality.cpu(), features.image_index.cpu())
    return [LayerWeights(row, tuple(layers), *others, features.info) for row, *others in rows]


def look(
    features: Features, dla, picture: Tensor | None = None, index: int = 0, layer: int | None = None
) -> tuple[Tensor, Tensor | None, str]:
    """(heat maps (B, h, w, 3), overlays (B, h, w, 3) or None without a picture, text) of what `dla`, a
    loaders.dla.DLA, attends to in these features; picture, index, layer: see `overlay`."""
    kept = kept_tokens(features, dla.config.template)
    prompts = layer_weights(features, dla.layer_weights(features), dla.config.pooled_layers, kept)
    over = None if picture is None else torch.cat([to_tensor(overlay(p, picture, index, layer)) for p in prompts])
    maps = [heat_map(prompt) for prompt in prompts]
    high = max(image.height for image in maps)
    maps = torch.cat([to_tensor(ImageOps.pad(image, (WIDTH, high), color=PAPER, centering=(0, 0))) for image in maps])
    return maps, over, "\n\n".join(describe(prompt, dla.name) for prompt in prompts)


def heat_map(found: LayerWeights) -> Image.Image:
    """A panel for text and one for image tokens: mean weight of each layer as bars, and below it every token's weights,
    one line a token (several to a line where there are many)."""
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
    """Draws one modality from `top` on and returns where it ends."""
    count, small, edges = len(found.layers), typeface(12), columns(len(found.layers))
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
    cells = Image.fromarray(colour(lines / largest))
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


def columns(count: int) -> list[int]:
    """x of the edges of `count` columns across a panel, in px."""
    return [LEFT + round(i * (WIDTH - RIGHT - LEFT) / count) for i in range(count + 1)]


def _scale(image, pen, left: int, top: int, width: int, low: float, high: float, signed: bool = True) -> None:
    """A bar of the colours from `low` to `high` with its numbers at both ends."""
    small = typeface(12)
    bar = width - 120
    values = torch.linspace(low / max(abs(high), 1e-12) if signed else 0.0, 1.0, bar)
    image.paste(Image.fromarray(colour(values[None].expand(10, -1))), (left + 60, top + 2))
    pen.rectangle((left + 60, top + 2, left + 60 + bar, top + 12), outline=FAINT)
    pen.text((left + 54, top + 7), f"{low:.3g}", GREY, small, anchor="rm")
    pen.text((left + 66 + bar, top + 7), f"{high:.3g}", GREY, small, anchor="lm")


def colour(values: Tensor) -> numpy.ndarray:
    """(h, w) in -1..1 -> (h, w, 3) uint8: HEAT above zero, COLD below."""
    values = values.double().clamp(-1, 1).numpy()
    out = numpy.empty((*values.shape, 3))
    for channel in range(3):
        warm = numpy.interp(values, numpy.linspace(0, 1, len(HEAT)), [c[channel] for c in HEAT])
        cold = numpy.interp(-values, numpy.linspace(0, 1, len(COLD)), [c[channel] for c in COLD])
        out[..., channel] = numpy.where(values < 0, cold, warm)
    return out.round().astype(numpy.uint8)


# ---- where image tokens lie on the picture


@dataclass(frozen=True)
class Placement:
    """Where the tokens of an image lie: `order` (rows, columns) holds token numbers, and their grid covers the box
    (left, top, right, bottom) in px of the picture, which reaches beyond it where the MLLM saw a border."""

    order: Tensor
    box: tuple[float, float, float, float]

    def over(self, values: Tensor, width: int, height: int) -> Tensor:
        """(n,) values of the tokens -> (height, width), each px with the value of the token that saw it."""
        grid, (left, top, right, bottom) = values[self.order], self.box
        rows, columns = grid.shape
        y = ((torch.arange(height) + 0.5 - top) / (bottom - top) * rows).long().clamp(0, rows - 1)
        x = ((torch.arange(width) + 0.5 - left) / (right - left) * columns).long().clamp(0, columns - 1)
        return grid[y][:, x]


def place(tokens: int, width: int, height: int, family: str) -> Placement:
    """Where `tokens` image tokens of an MLLM of that family lie on a picture of width x height px.

    InternVL: square tiles that hold the picture whole, with borders, a thumbnail of it last where there are several.
    The others: one grid over the whole picture, about square tokens. Worked out from the numbers alone, as
    loaders/mllm/vision.py lays the tokens out. Raises ValueError where the tokens cannot be those of such a picture.
    """
    if family == "internvl":
        side, tiles_x, tiles_y = _tiles(tokens, width / height)
        order = torch.arange(side * side * tiles_x * tiles_y)
        order = rearrange(order, "(r k h w) -> (r h) (k w)", r=tiles_y, k=tiles_x, h=side, w=side)
        scale = min(tiles_x / width, tiles_y / height)  # tiles per px
        w, h = tiles_x / scale, tiles_y / scale
        return Placement(order, ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2))
    exact = (tokens * height / width) ** 0.5  # rows, if tokens were square to the last px
    rows = min((r for r in range(1, tokens + 1) if tokens % r == 0), key=lambda r: abs(numpy.log(r / exact)))
    across, slack = tokens // rows, 0.55  # each side was rounded to whole tokens (and to whole px before)
    if (rows - slack) / height > (across + slack) / width or (across - slack) / width > (rows + slack) / height:
        raise ValueError(
            f"Layer Weights: the MLLM saw {tokens} tokens of this reference, which do not lie as {across} x {rows}"
            f" on a picture of {width} x {height} px. Connect the very picture that Encode Subject read, and set"
            " image_number to its place there."
        )
    return Placement(torch.arange(tokens).reshape(rows, -1), (0.0, 0.0, float(width), float(height)))


def _tiles(tokens: int, aspect: float) -> tuple[int, int, int]:
    """(tokens a side of a tile, tiles across, tiles down) of an InternVL image; the thumbnail is not counted."""
    found = []
    for side in range(1, int(tokens**0.5) + 1):
        count = tokens // (side * side)
        if tokens % (side * side) or count == 2:  # one tile, or several and a thumbnail
            continue
        pairs = [(n, (count - 1) // n) for n in range(1, count) if (count - 1) % n == 0] or [(1, 1)]
        across, down = min(pairs, key=lambda pair: abs(aspect - pair[0] / pair[1]))
        if count - 1 <= 64 and abs(aspect - across / down) <= abs(aspect - 1):  # or InternVL had taken one tile
            found.append((side == TILE, side, across, down))
    if not found:
        raise ValueError(f"Layer Weights: {tokens} tokens are no image of InternVL's, expected square tiles.")
    return max(found)[1:]


def overlay(found: LayerWeights, picture: Tensor, index: int = 0, layer: int | None = None) -> Image.Image:
    """A reference picture (H, W, 3) in 0..1, greyed, under the colours of its tokens: the weight of one layer, or the
    mean layer for None. A scale below has the numbers. The longest side is 768 px.

    index: 0-based reference image. Raises ValueError for a layer that the DLA does not pool, and where picture and
    tokens do not belong together.
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
    height, width = picture.shape[:2]
    placement = place(len(values), width, height, found.info.family)
    low, high = float(values.min()), float(values.max())
    shares = (values - low) / max(high - low, 1e-12) if layer is None or low >= 0 else values / max(abs(low), abs(high))
    scale = SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = to_picture(picture).convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    over = placement.over(shares, width, height)
    heat = Image.fromarray(colour(over)).resize(size, Image.Resampling.NEAREST)
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


def describe(found: LayerWeights, name: str = "") -> str:
    """A line per modality: tokens, mean layer, the layers that weigh most, and the shares of the paper's groups."""
    lines = [f"{name or 'DLA'}: pools layers {found.layers[0]}-{found.layers[-1]} ({len(found.layers)})"]
    for kind, title in MODALITIES.items():
        weights = found.of(kind)
        if not len(weights):
            continue
        mean, shares = weights.mean(dim=0), weights.abs()
        shares = (shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-12)).mean(dim=0)
        best = mean.abs().argsort(descending=True, stable=True)[:3].tolist()
        centre = found.mean_layer(weights)
        spread = f" +- {float(centre.std()):.1f} over tokens" if len(weights) > 1 else ""
        top = ", ".join(f"{found.layers[i]} ({float(mean[i]):.3f})" for i in best)
        parts = {}
        for part, numbers in groups(found.info.layers).items():
            at = [i for i, layer in enumerate(found.layers) if layer in numbers]
            span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else numbers[0]
            parts[f"{part} ({span})"] = float(shares[at].sum())
        thirds = ", ".join(f"{part} {share:.2f}" for part, share in parts.items())
        lines.append(
            f"{title}, {len(weights)} tokens: mean layer {float(centre.mean()):.2f}{spread}; most weight on {top};"
            f" share of {thirds}"
        )
    return "\n".join(lines)
