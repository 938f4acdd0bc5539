"""The demo's VAE outside the host's loader, for many pictures at a time."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...common.files import save_tensors
from .data import load_pictures
from .layout import FLUX_SCALE, FLUX_SHIFT, NAMES, SIDE
from .loop import autocast


def load_vae(run: Path):
    """The host's TAESD class with the run's weights in fp32, frozen."""
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=16)
    weights = load_file(run / "models" / "vae" / NAMES["vae"])
    vae.load_state_dict({key: value.float() for key, value in weights.items()})
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def encode(vae, pictures: Tensor) -> Tensor:
    """(n, 3, h, w) uint8 -> (n, 16, h / 8, w / 8), scaled as for the DiT."""
    pictures = pictures.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    with autocast():
        return (vae.encode(pictures).float() - FLUX_SHIFT) * FLUX_SCALE


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """(n, 16, h / 8, w / 8) as `encode` returns them -> (n, 3, h, w) in 0..1."""
    with autocast():
        return vae.decode(unscale(latents)).float().add(1).div(2).clamp(0, 1)


def unscale(latents: Tensor) -> Tensor:
    """From the DiT's scale back to the VAE's, fp32: `encode` without FLUX.1's scale and shift."""
    return latents.float() / FLUX_SCALE + FLUX_SHIFT


def encode_cached(data: Path, paths: list[str], run: Path) -> Tensor:
    """(n, 16, h / 8, w / 8) fp16 of these pictures, encoded once and read from RUN/latents.safetensors afterwards."""
    file = run / "latents.safetensors"
    if not file.exists():
        vae = load_vae(run)
        parts = [encode(vae, load_pictures(data, paths[i : i + 16])).half() for i in range(0, len(paths), 16)]
        save_tensors(file, {"latents": torch.cat([part.contiguous() for part in parts])})
    return load_file(file)["latents"]


def fill_latent_cache(data: Path, paths: list[str], run: Path, folder: Path) -> None:
    """Writes `encode_cached`'s latents into the cache of the pack's training, which would encode them one by one."""
    from ...loaders.host import load_vae as load_host_vae
    from ...training.data.latent_cache import LatentCache

    cache = LatentCache(load_host_vae(NAMES["vae"]), folder)
    for path, latent in zip(paths, unscale(encode_cached(data, paths, run))):
        cache.put(data / path, SIDE, SIDE, latent)
