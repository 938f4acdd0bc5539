"""Small random models under the file names that the shared workflows ask for, in the key layouts of the published ones.

    python common/bootstrap.py tests.small.models COMFYUI OUT

They need `tests/server/small_host` in the server: the host does not read these sizes from files by itself.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...common.bootstrap import start_host
from ...dla import DLAConfig, DualLayerAggregator, MLLMInfo, save_dla
from . import dit
from .mllm import build_internvl, build_qwen3vl, build_qwen25vl

DITS = {
    "flux": dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=2),
    "qwen_image": dict(num_attention_heads=2),
    "omnigen2": dict(hidden_size=240, num_attention_heads=2, num_kv_heads=1),
}
FLUX2 = {"hidden_size": 256, "num_heads": 2, "depth_single_blocks": 1}
QWEN_IMAGE_21 = {  # folder -> small file's kind, name
    "diffusion_models": ("qwen_image21", "qwen_image_2.1_int8_convrot"),
    "text_encoders": ("qwen3vl_8b", "qwen3vl_8b_int8_convrot"),
    "vae": ("wan_21", "qwen_image_2.1_vae_bf16"),
}
WAN_VAE = {
    "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "dropout": 0.0,
}  # fmt: skip
KL_VAE = {
    "double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "batch_norm_latent": True,
}  # fmt: skip


def main(comfyui: str, out: str | Path) -> None:
    start_host(comfyui)
    from ..server import small_host

    small_host.shrink_host()
    out, width = Path(out), small_host.WIDTH
    for kind in ("diffusion_models", "vae", "text_encoders", "mllm", "dla", "loras"):
        (out / kind).mkdir(parents=True, exist_ok=True)

    def save(name: str, weights: dict) -> None:
        save_file({key: value.contiguous() for key, value in weights.items()}, out / name)

    context = {"flux": "context_in_dim", "qwen_image": "joint_attention_dim", "omnigen2": "text_feat_dim"}
    flux, qwen, omnigen = (random_like(dit.build(f, DITS[f] | {context[f]: width}).state_dict()) for f in DITS)
    flux = {key.replace("_norm.weight", "_norm.scale"): value for key, value in flux.items()}
    save("diffusion_models/flux1-dev.safetensors", flux)
    save("diffusion_models/qwen_image_edit_2509_fp8_e4m3fn.safetensors", qwen)
    save("diffusion_models/omnigen2_fp16.safetensors", omnigen)

    if dit.on_this_host("flux2"):
        klein = random_like(dit.build("flux2", FLUX2 | {"context_in_dim": width}).state_dict())
        klein = {key.replace("_norm.weight", "_norm.scale"): value for key, value in klein.items()}
        save("diffusion_models/flux-2-klein-base-4b.safetensors", klein)
        save("vae/flux2-vae.safetensors", kl_vae())

    if dit.on_this_host("qwen_image21"):
        from .template_models import KINDS  # which imports from here

        for folder, (kind, name) in QWEN_IMAGE_21.items():
            save(f"{folder}/{name}.safetensors", KINDS[folder][kind]())

    taesd = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16})
    save("vae/ae.safetensors", random_like(taesd, torch.float32))
    wan = host_shapes("comfy.ldm.wan.vae", "WanVAE", WAN_VAE | small_host.WAN_VAE)
    save("vae/qwen_image_vae.safetensors", random_like(wan, torch.float32))

    # The host tells the 7B and the 3B model apart by the width of their keys.
    for name, kv_heads in (("qwen_2.5_vl_7b_fp8_scaled", 4), ("qwen_2.5_vl_fp16", 2)):
        folder = build_qwen25vl(out / "work", width=width, layers=3, heads=4, kv_heads=kv_heads)
        (folder / "model.safetensors").replace(out / "text_encoders" / f"{name}.safetensors")
        shutil.rmtree(folder)
    save("text_encoders/t5xxl_fp16.safetensors", random_like(text_encoder_shapes("t5xxl")))
    save("text_encoders/clip_l.safetensors", random_like(text_encoder_shapes("clip_l")))

    build_internvl(out / "mllm" / "InternVL3-8B-hf", width=64, layers=3)
    build_qwen3vl(out / "mllm" / "Qwen3-VL-4B-Instruct", width=64, layers=3)
    config = DLAConfig(MLLMInfo("InternVL3-8B-hf", "internvl", 3, 64), width, "flux")
    torch.manual_seed(0)
    for name in ("internvl3-8b-flux-dla", "my-dla"):
        save_dla(out / "dla" / f"{name}.safetensors", DualLayerAggregator(config))

    key = "diffusion_model.double_blocks.0.img_attn.proj"
    lora = random_like({f"{key}.lora_A.weight": torch.empty(4, 256), f"{key}.lora_B.weight": torch.empty(256, 4)})
    for name in ("dit_lora", "uso-flux1-dit-lora-v1", "subject-flux-lora", "my-dla"):
        save(f"loras/{name}.safetensors", lora)


def host_shapes(module: str, name: str, config: dict) -> dict[str, torch.Tensor]:
    """State dict of a class of the host, without memory. Hosts differ in the parameters that they know."""
    build = getattr(importlib.import_module(module), name)
    known = inspect.signature(build).parameters
    with torch.device("meta"):
        return build(**{key: value for key, value in config.items() if key in known}).state_dict()


def random_like(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights that carry a signal through: matrices scaled by their fan-in, norms at one, small biases."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        norm = "norm" in key and "bias" not in key
        scaled = noise / value[0].numel() ** 0.5 if value.ndim >= 2 else norm + 0.02 * noise
        weights[key] = scaled.to(dtype)
    return weights


def kl_vae() -> dict[str, torch.Tensor]:
    """A VAE of FLUX.2."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        state = AutoencoderKL(ddconfig=KL_VAE, embed_dim=32).state_dict()
    weights = random_like(state, torch.float32)
    return weights | {"bn.running_mean": torch.zeros(128), "bn.running_var": torch.ones(128)}


def text_encoder_shapes(name: str) -> dict[str, torch.Tensor]:
    """State dict of T5-XXL or CLIP-L as the (shrunk) host builds them."""
    import comfy.sd1_clip
    from comfy.text_encoders import sd3_clip

    state = (sd3_clip.T5XXLModel() if name == "t5xxl" else comfy.sd1_clip.SDClipModel()).transformer.state_dict()
    return {key: value for key, value in state.items() if not key.startswith("text_projection")}


if __name__ == "__main__":
    main(*sys.argv[1:3])
