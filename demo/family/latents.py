"""The demo's VAE outside the host's loader, for many pictures at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...common.files import save_tensors
from . import fit, pictures
from .layout import FLUX_SCALE, FLUX_SHIFT, NAMES, SIDE


def load_vae(run: Path):
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=16)
    weights = load_file(run / "models" / "vae" / NAMES["vae"])
    vae.load_state_dict({key: value.float() for key, value in weights.items()})
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def encode(vae, shown: Tensor) -> Tensor:
    """(n, 3, h, w) uint8 -> (n, 16, h / 8, w / 8), as the DiT sees them."""
    shown = shown.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    with fit.mixed():
        return (vae.encode(shown).float() - FLUX_SHIFT) * FLUX_SCALE


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) in 0..1."""
    with fit.mixed():
        return vae.decode(as_the_vae_gives(latents)).float().add(1).div(2).clamp(0, 1)


def as_the_vae_gives(latents: Tensor) -> Tensor:
    """From what the DiT sees, fp32: `encode` without FLUX.1's scale and shift."""
    return latents.float() / FLUX_SCALE + FLUX_SHIFT


def encoded(data: Path, names: list[str], run: Path) -> Tensor:
    """(n, 16, h / 8, w / 8) fp16 of these pictures, kept beside the run."""
    file = run / "latents.safetensors"
    if not file.exists():
        vae = load_vae(run)
        parts = [
            encode(vae, pictures.load(data, names[i : i + 16])).half().contiguous() for i in range(0, len(names), 16)
        ]
        save_tensors(file, {"latents": torch.cat(parts)})
    return load_file(file)["latents"]


def hand_over(data: Path, names: list[str], run: Path, folder: Path) -> None:
    """Leaves what `encoded` keeps where the pack's training looks for it, in place of encoding one picture at a time."""
    from ...loaders.host import load_vae as by_host
    from ...training.data.latent_cache import LatentCache

    cache = LatentCache(by_host(NAMES["vae"]), folder)
    for name, latent in zip(names, as_the_vae_gives(encoded(data, names, run))):
        cache.put(data / name, SIDE, SIDE, latent)
