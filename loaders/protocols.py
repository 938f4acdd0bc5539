"""What the pack uses of the host's MODEL, VAE and CLIP, as types: the host's own classes match them by shape."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Model(Protocol):
    """A MODEL socket: the host's ModelPatcher around a diffusion model."""

    model: Any
    model_options: dict[str, Any]
    load_device: torch.device

    def clone(self) -> Model:
        """A patcher of its own around the same weights."""

    def get_model_object(self, name: str) -> Any:
        """An attribute of the host's model by its dotted name, patches included."""


class VAE(Protocol):
    """A VAE socket."""

    latent_channels: int

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1 to latents."""

    def decode(self, samples_in: Tensor) -> Tensor:
        """Latents to (B, H, W, 3) in 0..1."""

    def spacial_compression_encode(self) -> int:
        """Pixels for each latent position along a side; the spelling is the host's."""


class CLIP(Protocol):
    """A CLIP socket: a text encoder with its tokenizer."""

    patcher: Any
    cond_stage_model: Any
    tokenizer: Any

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Tokens with weights for each tokenizer."""

    def load_model(self) -> Any:
        """Loads the weights onto the device; returns the patcher."""
