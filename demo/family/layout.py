"""Files, sizes and the DiT's configuration of the demo's family of models, which docs/demo-family.md describes."""

from ...common.bootstrap import ROOT

MODELS = ROOT / "demo" / "models"  # with ComfyUI's sub-folders
NAMES = {
    "mllm": "demo-qwen2.5-vl",
    "dla": "demo.safetensors",
    "loras": "demo.safetensors",
    "diffusion_models": "demo-flux.safetensors",
    "vae": "demo-taef1.safetensors",
}
SIDE = 112  # px of its pictures: a multiple of the MLLM's 28 and of the DiT's 16
CONTEXT_WIDTH = 128
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # from the VAE's latents to the DiT's, FLUX.1's in the host
# FLUX.1's layout made small, without distilled guidance.
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 192, "num_heads": 6,
    "mlp_ratio": 4.0, "depth": 3, "depth_single_blocks": 6, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
    "guidance_embed": False, "vec_in_dim": 16, "context_in_dim": CONTEXT_WIDTH, "txt_ids_dims": [],
}  # fmt: skip
# Not read from the weights by every host, so written into the file's metadata.
SIZES = ("num_heads", "hidden_size", "context_in_dim", "vec_in_dim", "axes_dim")


def flux_config() -> dict:
    """FLUX without the parameters that this host's class does not have."""
    import inspect

    import comfy.ldm.flux.model

    known = inspect.signature(comfy.ldm.flux.model.FluxParams).parameters
    return {key: value for key, value in FLUX.items() if key in known}
