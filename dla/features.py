"""Features of an MLLM: the hidden states of every layer at every token, and the kind of each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from einops import rearrange
from torch import Tensor


class Modality(IntEnum):
    """Kind of a token. TEMPLATE is all that the user did not give: system prompt, role headers, trailing markup."""

    TEXT = 0
    IMAGE = 1
    TEMPLATE = 2


@dataclass(frozen=True)
class MLLMInfo:
    """Which MLLM made the features; a DLA records the one that it was trained on."""

    name: str  # for people: folder or file name, e.g. "internvl3-8b"
    family: str  # a name in loaders/mllm/families.py, e.g. "internvl"
    layers: int  # decoder layers L; hidden states are numbered 0..L
    width: int  # C
    drop_leading_template: bool = True  # whether the stock model drops what precedes the user's turn before its DiT

    def __post_init__(self) -> None:
        for field in ("name", "family"):
            if not isinstance(value := getattr(self, field), str) or len(value) > 255:  # messages hold it whole
                raise ValueError(f"MLLM {field} is {value!r:.100}, expected text of at most 255 letters.")
        for field, top in (("layers", 1024), ("width", 65536)):
            if not is_whole(value := getattr(self, field), 1, top):
                raise ValueError(f"MLLM {field} is {value!r:.100}, expected a whole number from 1 to {top}.")
        if not isinstance(self.drop_leading_template, bool):
            raise ValueError(
                f"MLLM drop_leading_template is {self.drop_leading_template!r:.100}, expected true or false."
            )

    def __str__(self) -> str:
        return f"{self.name} ({self.family}, {self.layers} layers, width {self.width})"


@dataclass(frozen=True)
class StockContext:
    """What a text encoder's stock DiT reads of its hidden states, where no DLA is in between."""

    layers: tuple[int, ...] = (-1,)  # their numbers, side by side in the context's width; -1 = L, counted from the end
    normed: bool = True  # False: the last layer without the final norm, which is number L + 1
    interleaved: bool = False  # whether a channel's layers are neighbours, else a layer's channels are
    padding: bool = False  # whether padding tokens go along, masked
    always_masked: bool = False  # whether the attention mask goes along where it masks nothing

    def numbers(self, top: int) -> tuple[int, ...]:
        """The layer numbers for an MLLM of `top` layers."""
        numbers = [number if number >= 0 else top + 1 + number for number in self.layers]
        return tuple(numbers if self.normed else [*numbers[:-1], top + 1])


@dataclass(frozen=True)
class ImageGrid:
    """The raster of one image's tokens.

    Without tiles it covers the image exactly and its tokens come row by row. With tiles (InternVL) the image is fitted
    into it, aspect kept and centred; the tokens come tile by tile, those of a thumbnail of the whole image last.
    """

    rows: int  # tokens down the whole image, the thumbnail not counted
    columns: int  # tokens across it
    tiles: tuple[int, int] | None = None  # tiles down and across; they divide the tokens evenly
    thumbnail: bool = False  # whether the tokens of one more tile follow, which shows the whole image

    def __post_init__(self) -> None:
        tiles = None if self.tiles is None else tuple(self.tiles)
        object.__setattr__(self, "tiles", tiles)
        sizes = (self.rows, self.columns)
        whole = all(is_whole(size, 1, 65536) for size in (*sizes, *(tiles or ())))
        if not whole or (tiles and (len(tiles) != 2 or any(size % count for size, count in zip(sizes, tiles)))):
            raise ValueError(f"{self}: expected 1 or more rows and columns, and tiles that divide them evenly.")
        if self.thumbnail and not tiles:
            raise ValueError(f"{self}: a thumbnail comes with tiles only.")

    @property
    def tokens(self) -> int:
        """Number of the image's tokens."""
        down, across = self.tiles or (1, 1)
        return self.rows * self.columns + self.thumbnail * (self.rows // down) * (self.columns // across)

    def raster(self) -> Tensor:
        """Token numbers by place, (rows, columns) int64, counted from the image's first token."""
        down, across = self.tiles or (1, 1)
        order = torch.arange(self.rows * self.columns)
        return rearrange(order, "(r k h w) -> (r h) (k w)", r=down, k=across, h=self.rows // down)


Grids = tuple[tuple[ImageGrid, ...], ...]  # by prompt and image


@dataclass(frozen=True, eq=False)
class Features:
    """Hidden states of one batch (the MLLM_FEATURES socket). B prompts, M layers, T tokens, C channels.

    A layer number means the same for every MLLM: 0 = the embeddings (projected ViT features at the image tokens),
    i = output of decoder layer i-1, L = the last one after the final norm. L + 1 = the last one before that norm, which
    is there where the stock context is made of it; a DLA reads it in the place of L if it says so (`before_norm`).
    """

    hidden_states: Tensor  # (B, M, T, C) floating; entry j is layer number layers[j]
    layers: tuple[int, ...]  # layer numbers present, ascending; all of 0..L unless fewer were asked for
    modality: Tensor  # (B, T) uint8, Modality
    image_index: Tensor  # (B, T) int16, 0-based reference image of an image token, -1 for other tokens
    attention_mask: Tensor  # (B, T) bool, False = padding
    info: MLLMInfo
    # Per prompt, how many positions (left padding included) come before the user's turn, i.e. what a stock model that
    # drops the leading template cuts off. None: worked out from `modality`, which is wrong for an empty prompt, since
    # that is template tokens from end to end.
    prefix: tuple[int, ...] | None = None
    grids: Grids | None = None  # None = not known (0.1.0's caches)
    stock: StockContext | None = None  # None = the last layer

    def __post_init__(self) -> None:
        def expect(valid: bool, problem: str) -> None:
            if not valid:
                raise ValueError(problem)

        hidden, layers, info = self.hidden_states, tuple(int(layer) for layer in self.layers), self.info
        object.__setattr__(self, "layers", layers)
        shape = tuple(hidden.shape)
        floating = len(shape) == 4 and hidden.is_floating_point()
        expect(floating, f"hidden_states is {hidden.dtype} {shape}, expected floating (B, M, T, C).")
        batch, entries, tokens, width = shape
        expect(all(shape), f"hidden_states has shape {shape}, expected at least one prompt, layer and token.")
        expect(
            width == info.width, f"hidden_states has width {width}, expected {info.width}, the width of {info.name}."
        )
        named = f"hidden_states holds {entries} layers, but layers names {len(layers)}: {layers}."
        expect(len(layers) == entries, named)
        top = info.layers if self.stock is None or self.stock.normed else info.layers + 1
        rising = list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] <= top
        expect(rising, f"layers is {layers}, expected ascending numbers from 0 to {top} ({info.name}).")
        for field, dtype in (("modality", torch.uint8), ("image_index", torch.int16), ("attention_mask", torch.bool)):
            found = (value := getattr(self, field)).dtype, tuple(value.shape)
            wanted = f"{dtype} {(batch, tokens)}"
            expect(found == (dtype, (batch, tokens)), f"{field} is {found[0]} {found[1]}, expected {wanted}.")
        top = int(self.modality.max())
        expect(top <= max(Modality), f"modality holds {top}, expected 0 (text), 1 (image) or 2 (template).")
        matching = torch.equal(self.image_index >= 0, self.modality == Modality.IMAGE)
        expect(matching, "image_index must be 0 or more at image tokens and -1 at all others.")
        expect(bool(self.attention_mask.any(dim=1).all()), "attention_mask leaves a prompt without a single token.")
        if self.prefix is not None:
            inside = len(self.prefix) == batch and all(0 <= length <= tokens for length in self.prefix)
            expect(inside, f"prefix is {self.prefix}, expected {batch} numbers from 0 to {tokens}.")
        if self.grids is not None:
            counts = [row[row >= 0].bincount().tolist() for row in self.image_index.long()]
            sizes = [[grid.tokens for grid in grids] for grids in self.grids]
            expect(
                sizes == counts, f"grids are of {sizes} tokens by prompt and image, expected {counts} by image_index."
            )

    def layer(self, number: int) -> Tensor:
        """Hidden states (B, T, C) of one layer, by its number. Raises ValueError if it was not kept."""
        if number not in self.layers:
            raise ValueError(
                f"Layer {number} of {self.info.name} is not in these features, which hold "
                f"{describe_layers(self.layers)}. Encode again with all layers, or with this DLA "
                "connected to the encoder."
            )
        return self.hidden_states[:, self.layers.index(number)]


def describe_layers(layers: Sequence[int]) -> str:
    """Ascending layer numbers in words: "layers 0-28", "layers 0, 14, 28" or "layer 3"."""
    if len(layers) > 2 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number (not a bool) from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
