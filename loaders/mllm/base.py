"""MLLMs under the host's model management: what they share, whichever back end runs them.

A prompt becomes one chat-formatted text with one placeholder per reference image; the back end turns it into hidden
states; here every token gets its modality.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...dla.features import Features, ImageGrid, MLLMInfo, Modality, StockContext
from .families import MLLMFamily


class MLLMError(ValueError):
    """An MLLM that cannot be loaded, or cannot read a prompt or its images; the text has the remedy."""


class MLLM(ABC):
    """An MLLM ready to encode. `patcher` is the host's model patcher around it, for model management and LoRAs."""

    patcher: Any
    stock = StockContext()  # the context that its own DiT reads
    prefix: int | None = None  # this and the next: see HostEncoder
    most_images: int | None = None
    fixed_size = 0  # px, side at which every image is read; 0 = any
    drop_header = True
    starts = 0  # tokens before the text that the tokenizer adds

    def __init__(self, info: MLLMInfo, family: MLLMFamily):
        self.info, self.family, self.template = info, family, family.template
        self.reads_images, self.default_size = family.vision is not None, family.default_size

    @property
    def context_width(self) -> int:
        """Channels of the context without a DLA."""
        return self.info.width * len(self.stock.layers)

    def encode(
        self,
        prompt: str,
        images: Sequence[Tensor] = (),
        *,
        image_size: int = 0,
        tiles: int = 0,
        system_prompt: str | None = None,
        layers: Collection[int] | None = None,
    ) -> Features:
        """Hidden states of a prompt read together with images.

        Args:
            prompt: The user's words.
            images: Each (H, W, 3) in 0..1, as `collect_images` gives them.
            image_size: Side in px of the square that has the area at which the MLLM reads an image (InternVL: side of a
                tile); 0 = the family's default.
            tiles: InternVL: most tiles per image; 0 = 1.
            system_prompt: None or "" = the family's stock template.
            layers: Layer numbers wanted, None = all of 0..L, and L + 1 where the stock context is made of it; layers
                above the highest are not run.

        Returns:
            Features of batch 1.

        Raises:
            MLLMError: For arguments out of range, images that it cannot read, or an unexpected number of tokens.
        """
        images, wanted, default = list(images), self._wanted(layers), self.default_size
        if images and not self.reads_images:
            raise MLLMError(
                f"{self.info.name} reads text only, but {len(images)} image(s) are connected. Disconnect them (this"
                " model gets its references as VAE latents, with Add Identity), or load a multimodal one: Load MLLM."
            )
        if self.most_images is not None and len(images) > self.most_images:
            raise MLLMError(
                f"{self.info.name} reads {self.most_images} image(s) at most in this text encoder's template, but"
                f" {len(images)} are connected. Connect fewer; the others go to Add Identity alone."
            )
        if image_size and not 28 <= image_size <= 4096:
            raise MLLMError(f"image_size is {image_size}, expected 0 (default, {default}) or 28 to 4096 px.")
        if images and image_size and self.fixed_size:
            raise MLLMError(
                f"image_size is {image_size}, expected 0: {self.info.name} reads {self.fixed_size} px alone."
            )
        if not 0 <= tiles <= 64:
            raise MLLMError(f"tiles is {tiles}, expected 0 (default, 1) to 64.")
        text = self.template.text(prompt, len(images), system_prompt)
        tail = self.template.tail if text.endswith(self.template.tail) else ""
        states, tokens, mask, grids = self.run(text, images, image_size or default, max(tiles, 1), wanted)
        padding = _padding(mask[0])
        modality, image_index, prefix = self._token_layout(tokens, [grid.tokens for grid in grids], padding, tail)
        if states.shape[2] != len(modality):
            raise MLLMError(
                f"{self.info.name} gave {states.shape[2]} tokens, expected {len(modality)} for this prompt and"
                f" {len(images)} image(s). A node has probably changed its tokenizer or its vision tower."
            )
        if not all(end.isfinite() for end in states.aminmax()):  # one pass without a copy: NaN passes through both
            raise MLLMError(
                f"{self.info.name} gives NaN or infinity as hidden states: its weights or config are damaged, or too"
                " large for its dtype. Download it again, load it with weight_dtype bf16 or fp32, or start the host"
                " with --fp32-text-enc."
            )
        kinds = modality[None], image_index[None], mask
        return Features(states, wanted, *kinds, self.info, (prefix,), (tuple(grids),), self.stock)

    @abstractmethod
    def run(
        self, text: str, images: list[Tensor], size: int, tiles: int, wanted: tuple[int, ...]
    ) -> tuple[Tensor, list[int | None], Tensor, list[ImageGrid]]:
        """Runs the MLLM on a whole text with placeholders; arguments as in `encode`, with defaults filled in.

        Returns:
            States (1, M, T, C) of the layers `wanted`; token ids with None for an image; mask (1, T) bool; each image's
            grid.
        """

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without a template around it; [] for an empty one."""

    def _wanted(self, layers: Collection[int] | None) -> tuple[int, ...]:
        top = self.info.layers
        every = (*range(top + 1), *(() if self.stock.normed else (top + 1,)))
        wanted = every if layers is None else tuple(sorted({int(layer) for layer in layers}))
        if not wanted or wanted[0] < 0 or wanted[-1] > every[-1]:
            before_norm = (
                f" {top + 1}, the last layer before the norm, comes from MLLM from CLIP with the text encoder of a"
                " model that reads it (Qwen-Image 2.1)."
            )
            raise MLLMError(
                f"layers is {wanted}, expected numbers from 0 (embeddings) to {top}, the last of {self.info.name}."
                + before_norm * (wanted[-1] == top + 1)
            )
        return wanted

    def _token_layout(
        self, tokens: Sequence[int | None], counts: Sequence[int], padding: tuple[int, int], tail: str
    ) -> tuple[Tensor, Tensor, int]:
        """Modality (T,) and image index (T,) of each token, and the length of the prefix; `tail` ends the text."""
        first, end = padding[0], len(tokens) - padding[1]
        prefix = self.prefix
        if prefix is None:
            prefix = first + self._turn(tokens[first:end])
        end -= len(self.tokenize(tail))
        modality, image_index, image = [], [], 0
        for position, token in enumerate(tokens):
            if token is None:
                modality += [Modality.IMAGE] * counts[image]
                image_index += [image] * counts[image]
                image += 1
            else:
                modality.append(Modality.TEXT if prefix <= position < end else Modality.TEMPLATE)
                image_index.append(-1)
        return torch.tensor(modality, dtype=torch.uint8), torch.tensor(image_index, dtype=torch.int16), prefix

    def _turn(self, tokens: Sequence[int | None]) -> int:
        """Tokens before the user's turn. Vision markers are text, as the stock conditioning keeps them."""
        header = self.tokenize(self.template.turn)
        if not header:
            return self.starts
        if self.info.drop_leading_template:
            # as the host's Qwen-Image text encoder counts what it drops: all before the second <|im_start|>, and the
            # header where it follows as three tokens of its own
            start = [i for i, token in enumerate(tokens) if token == header[0]][:2]
        else:
            opening = header[:2]  # its line break may be one token with a prompt's
            start = [i for i in range(len(tokens)) if list(tokens[i : i + len(opening)]) == opening][:1]
        prefix = start[-1] if start else 0
        if not self.drop_header:
            return prefix
        if list(tokens[prefix : prefix + len(header)]) == header and len(tokens) > prefix + len(header):
            prefix += len(header)
        return prefix


def _padding(mask: Tensor) -> tuple[int, int]:
    """Tokens of padding before and after those of a mask (T,)."""
    kept = mask.nonzero()
    return int(kept[0]), len(mask) - 1 - int(kept[-1])
