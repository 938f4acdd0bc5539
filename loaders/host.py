"""Every reach into the host that depends on its version or its modules' names, once.

`import nodes` here is the host's nodes.py; this pack's folder of that name is `subject_dla.nodes`.
"""

from __future__ import annotations

from torch import Tensor

from .protocols import CLIP, VAE, Model


def make_patcher(model, load_device, offload_device):
    """The host's patcher around one of the pack's own models; where the host has it, the one for dynamic VRAM."""
    import comfy.model_patcher

    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=load_device, offload_device=offload_device)


def load_vae(name: str) -> VAE:
    """VAE of a file under `models/vae` (or one of the host's tiny ones, e.g. "taef1"), by the host's Load VAE."""
    import nodes

    return nodes.VAELoader().load_vae(name)[0]


def load_clip(name: str, kind: str) -> CLIP:
    """CLIP of one file under `models/text_encoders`, by the host's Load CLIP; `kind`: its type, e.g. "qwen_image"."""
    import nodes

    return nodes.CLIPLoader().load_clip(name, kind)[0]


def load_dual_clip(first: str, second: str, kind: str) -> CLIP:
    """CLIP of two files under `models/text_encoders`, by the host's DualCLIPLoader; `kind`: its type, e.g. "flux"."""
    import nodes

    return nodes.DualCLIPLoader().load_clip(first, second, kind)[0]


def fit_latent(model: Model, latent: dict) -> Tensor:
    """Samples of a LATENT with the model's channels and downscale if they are empty; later hosts take ratios."""
    import inspect

    from comfy.sample import fix_empty_latent_channels

    takes = len(inspect.signature(fix_empty_latent_channels).parameters) - 2
    ratios = [latent.get(key) for key in ("downscale_ratio_spacial", "downscale_ratio_temporal")]
    return fix_empty_latent_channels(model, latent["samples"], *ratios[: max(takes, 0)])


def to_intermediate(samples: Tensor) -> Tensor:
    """Samples on the device, and on later hosts in the dtype, that the host keeps LATENTs in."""
    import comfy.model_management

    samples = samples.to(comfy.model_management.intermediate_device())
    dtype = getattr(comfy.model_management, "intermediate_dtype", None)
    return samples if dtype is None else samples.to(dtype())
