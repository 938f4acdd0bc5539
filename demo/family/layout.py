"""The demo's family of models: trained by this project on rendered toys (docs/demo-family.md), small enough for a CPU,
in the layouts and folders of the real ones.
"""

from __future__ import annotations

from ...common.bootstrap import ROOT

MODELS = ROOT / "demo" / "models"  # laid out like ComfyUI's
NAMES = {
    "mllm": "demo-qwen2.5-vl",
    "dla": "demo.safetensors",
    "loras": "demo.safetensors",
    "diffusion_models": "demo-flux.safetensors",
    "vae": "demo-taef1.safetensors",
}
SIDE = 112  # px of its pictures: a multiple of the MLLM's 28 and of the DiT's 16
CONTEXT_WIDTH = 128
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # FLUX.1's latents, as the host takes them to the DiT
# FLUX.1's layout made small, without the distilled guidance; older hosts take some sizes for granted, so the file says
# them (loaders/dit.py).
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 192, "num_heads": 6,
    "mlp_ratio": 4.0, "depth": 3, "depth_single_blocks": 6, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
    "guidance_embed": False, "vec_in_dim": 16, "context_in_dim": CONTEXT_WIDTH, "txt_ids_dims": [],
}  # fmt: skip
SIZES = ("num_heads", "hidden_size", "context_in_dim", "vec_in_dim", "axes_dim")  # not read from weights by every host


def flux_config() -> dict:
    """FLUX as far as this host's class knows its parameters."""
    import inspect

    import comfy.ldm.flux.model

    known = inspect.signature(comfy.ldm.flux.model.FluxParams).parameters
    return {key: value for key, value in FLUX.items() if key in known}
