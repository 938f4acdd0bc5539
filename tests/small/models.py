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
from .mllm import build_internvl, build_qwen25vl

FLUX = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 4.0,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    "guidance_embed": True, "vec_in_dim": 768, "context_in_dim": 128, "txt_ids_dims": [],
}  # fmt: skip
QWEN_DIT = {"in_channels": 64, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 128}
OMNIGEN2_DIT = {
    "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None, "hidden_size": 240,
    "in_channels": 16, "multiple_of": 256, "norm_eps": 1e-05, "num_attention_heads": 2, "num_kv_heads": 1,
    "num_layers": 1, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "timestep_scale": 1000.0,
}  # fmt: skip
WAN_VAE = {
    "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "dropout": 0.0,
}  # fmt: skip


def build(out: Path, small_host) -> None:
    width = small_host.WIDTH
    for kind in ("diffusion_models", "vae", "text_encoders", "mllm", "dla", "loras"):
        (out / kind).mkdir(parents=True, exist_ok=True)

    def save(name: str, weights: dict) -> None:
        save_file({key: value.contiguous() for key, value in weights.items()}, out / name)

    flux = random_like(host_shapes("comfy.ldm.flux.model", "Flux", FLUX | {"context_in_dim": width}))
    save(
        "diffusion_models/flux1-dev.safetensors", {k.replace("_norm.weight", "_norm.scale"): v for k, v in flux.items()}
    )
    qwen = ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel", QWEN_DIT | {"joint_attention_dim": width})
    save("diffusion_models/qwen_image_edit_2509_fp8_e4m3fn.safetensors", random_like(host_shapes(*qwen)))
    omnigen = ("comfy.ldm.omnigen.omnigen2", "OmniGen2Transformer2DModel", OMNIGEN2_DIT | {"text_feat_dim": width})
    save("diffusion_models/omnigen2_fp16.safetensors", random_like(host_shapes(*omnigen)))

    taesd = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16}, own=False)
    save("vae/ae.safetensors", random_like(taesd, torch.float32))
    wan = host_shapes("comfy.ldm.wan.vae", "WanVAE", WAN_VAE | small_host.WAN_VAE, own=False)
    save("vae/qwen_image_vae.safetensors", random_like(wan, torch.float32))

    for name, sizes in (("qwen_2.5_vl_7b_fp8_scaled", small_host.QWEN_7B), ("qwen_2.5_vl_fp16", small_host.QWEN_3B)):
        folder = build_qwen25vl(out / "work", width=width, layers=3, heads=4, kv_heads=sizes["num_key_value_heads"])
        (folder / "model.safetensors").replace(out / "text_encoders" / f"{name}.safetensors")
        shutil.rmtree(folder)
    save("text_encoders/t5xxl_fp16.safetensors", random_like(text_encoder_shapes("t5xxl")))
    save("text_encoders/clip_l.safetensors", random_like(text_encoder_shapes("clip_l")))

    build_internvl(out / "mllm" / "InternVL3-8B-hf", width=64, layers=3)
    config = DLAConfig(MLLMInfo("InternVL3-8B-hf", "internvl", 3, 64), width, "flux")
    torch.manual_seed(0)
    for name in ("internvl3-8b-flux-dla", "my-dla"):
        save_dla(out / "dla" / f"{name}.safetensors", DualLayerAggregator(config))

    key = "diffusion_model.double_blocks.0.img_attn.proj"
    lora = random_like({f"{key}.lora_A.weight": torch.Size((4, 256)), f"{key}.lora_B.weight": torch.Size((256, 4))})
    for name in ("dit_lora", "uso-flux1-dit-lora-v1", "subject-flux-lora", "my-dla"):
        save(f"loras/{name}.safetensors", lora)


def host_shapes(module: str, name: str, config: dict, own: bool = True) -> dict[str, torch.Size]:
    """Keys and shapes of a class of the host, built without memory. own: it takes dtype, device and operations."""
    import comfy.ops

    code = importlib.import_module(module)
    parameters = getattr(code, "FluxParams", getattr(code, name)) if name == "Flux" else getattr(code, name)
    known = inspect.signature(parameters).parameters
    config = {key: value for key, value in config.items() if key in known}
    extra = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init} if own else {}
    with torch.device("meta"):
        model = getattr(code, name)(**config, **extra)
    return {key: value.shape for key, value in model.state_dict().items()}


def random_like(shapes: dict[str, torch.Size], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights that carry a signal through: matrices scaled by their fan-in, norms at one, small biases."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            value = noise / shape[1:].numel() ** 0.5
        else:
            value = 1 + 0.02 * noise if "norm" in key and "bias" not in key else 0.02 * noise
        weights[key] = value.to(dtype)
    return weights


def text_encoder_shapes(name: str) -> dict[str, torch.Size]:
    """Keys and shapes of T5-XXL or CLIP-L as the (shrunk) host builds them."""
    import comfy.sd1_clip
    from comfy.text_encoders import sd3_clip

    model = sd3_clip.T5XXLModel() if name == "t5xxl" else comfy.sd1_clip.SDClipModel()
    return {
        key: value.shape
        for key, value in model.transformer.state_dict().items()
        if not key.startswith("text_projection")
    }


def main(comfyui: str, out: str) -> None:
    start_host(comfyui)
    from ..server import small_host

    small_host.shrink_host()
    build(Path(out), small_host)


if __name__ == "__main__":
    main(*sys.argv[1:3])
