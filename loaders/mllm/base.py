"""MLLMs under the host's model management: what they share, whichever back end runs them.

A prompt becomes one chat-formatted text with one placeholder per reference image; the back end turns it into hidden
states; here every token gets its modality.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...dla.features import Features, ImageGrid, MLLMInfo, Modality
from .families import MLLMFamily


class MLLMError(ValueError):
    """An MLLM that cannot be loaded, or cannot read a prompt or its images; the text has the remedy."""


class MLLM(ABC):
    """An MLLM ready to encode. `patcher` is the host's model patcher around it, for model management and LoRAs."""

    patcher: Any

    def __init__(self, info: MLLMInfo, family: MLLMFamily):
        self.info, self.family, self.template = info, family, family.template
        self.reads_images = family.vision is not None

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
            layers: Layer numbers wanted, None = all of 0..L; layers above the highest are not run by transformers.

        Returns:
            Features of batch 1.

        Raises:
            MLLMError: For arguments out of range, images that it cannot read, or an unexpected number of tokens.
        """
        images, wanted, default = list(images), self._wanted(layers), self.family.default_size
        if images and not self.reads_images:
            raise MLLMError(
                f"{self.info.name} reads text only, but {len(images)} image(s) are connected. Disconnect them (this"
                " model gets its references as VAE latents, with Add Identity), or load a multimodal one: Load MLLM."
            )
        if image_size and not 28 <= image_size <= 4096:
            raise MLLMError(f"image_size is {image_size}, expected 0 (default, {default}) or 28 to 4096 px.")
        if not 0 <= tiles <= 64:
            raise MLLMError(f"tiles is {tiles}, expected 0 (default, 1) to 64.")
        text = self.template.text(prompt, len(images), system_prompt)
        tail = self.template.tail if text.endswith(self.template.tail) else ""
        states, tokens, mask, grids = self.run(text, images, image_size or default, max(tiles, 1), wanted)
        modality, image_index, prefix = _token_layout(
            tokens, [grid.tokens for grid in grids], self.tokenize("<|im_start|>user\n"), len(self.tokenize(tail))
        )
        if states.shape[2] != len(modality):
            raise MLLMError(
                f"{self.info.name} gave {states.shape[2]} tokens, expected {len(modality)} for this prompt and"
                f" {len(images)} image(s). A node has probably changed its tokenizer or its vision tower."
            )
        return Features(states, wanted, modality[None], image_index[None], mask, self.info, (prefix,), (tuple(grids),))

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
        wanted = tuple(range(top + 1)) if layers is None else tuple(sorted({int(layer) for layer in layers}))
        if not wanted or wanted[0] < 0 or wanted[-1] > top:
            raise MLLMError(
                f"layers is {wanted}, expected numbers from 0 (embeddings) to {top}, the last of {self.info.name}."
            )
        return wanted


def _token_layout(
    tokens: Sequence[int | None], counts: Sequence[int], header: Sequence[int], tail: int
) -> tuple[Tensor, Tensor, int]:
    """Modality (T,) and image index (T,) of each token, and the length of the prefix; `tail` tokens end the text."""
    # The prefix is what the host's Qwen-Image text encoder drops: all before the second <|im_start|>, and the header
    # where it follows as three tokens of its own. Vision markers are text, as the stock conditioning keeps them.
    start = [i for i, token in enumerate(tokens) if token == header[0]][:2]
    prefix = start[-1] if start else 0
    if list(tokens[prefix : prefix + 3]) == list(header) and len(tokens) > prefix + 3:
        prefix += 3
    modality, image_index, image = [], [], 0
    for position, token in enumerate(tokens):
        if token is None:
            modality += [Modality.IMAGE] * counts[image]
            image_index += [image] * counts[image]
            image += 1
        else:
            inside = prefix <= position < len(tokens) - tail
            modality.append(Modality.TEXT if inside else Modality.TEMPLATE)
            image_index.append(-1)
    return torch.tensor(modality, dtype=torch.uint8), torch.tensor(image_index, dtype=torch.int16), prefix
