"""Small random models that measure: Orient Anything with its published keys, a DINO and a CLIP as saved folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=224)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, eos_token_id=49407)


def published_state(width: int, layers: int, bins: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published keys, written out here and not taken from the loader."""
    generator = torch.Generator().manual_seed(seed)
    out = 360 + 180 + bins + 2

    def normal(*shape, std=0.02, mean=0.0):
        return torch.randn(shape, generator=generator) * std + mean

    state = {
        "embeddings.cls_token": normal(1, 1, width, std=0.5),
        "embeddings.mask_token": normal(1, width),
        "embeddings.position_embeddings": normal(1, 1370, width, std=0.5),
        "embeddings.patch_embeddings.projection.weight": normal(width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": normal(width),
    }
    linear = [f"attention.{name}" for name in ("attention.query", "attention.key", "attention.value", "output.dense")]
    for layer in range(layers):
        base = f"encoder.layer.{layer}."
        for name in linear:
            state[f"{base}{name}.weight"] = normal(width, width, std=2 / width**0.5)
            state[f"{base}{name}.bias"] = normal(width, std=0.2)
        for name in ("layer_scale1", "layer_scale2"):
            state[f"{base}{name}.lambda1"] = normal(width, std=0.2, mean=0.5)
        for name in ("norm1", "norm2"):
            state[f"{base}{name}.weight"], state[f"{base}{name}.bias"] = normal(width, mean=1), normal(width, std=0.2)
        state[f"{base}mlp.fc1.weight"], state[f"{base}mlp.fc1.bias"] = normal(4 * width, width), normal(4 * width)
        state[f"{base}mlp.fc2.weight"], state[f"{base}mlp.fc2.bias"] = normal(width, 4 * width), normal(width)
    state["layernorm.weight"], state["layernorm.bias"] = normal(width, std=0.2, mean=1), normal(width, std=0.2)
    state = {"dinov2." + key: value for key, value in state.items()}
    for name, columns in (("net1", width), ("net2", out)):
        state[f"down_sampler.{name}.0.weight"] = normal(out, columns, std=1 / columns**0.5)
        state[f"down_sampler.{name}.0.bias"] = normal(out)
        state[f"down_sampler.{name}.1.weight"] = normal(out, std=0.2, mean=1)
        state[f"down_sampler.{name}.1.bias"] = normal(out, std=0.2)
        state[f"down_sampler.{name}.1.running_mean"] = normal(out, std=0.3)
        state[f"down_sampler.{name}.1.running_var"] = normal(out, std=0.2).abs() + 0.5
        state[f"down_sampler.{name}.1.num_batches_tracked"] = torch.tensor(7)
    return state


def build_measures(models: Path, comfyui: Path) -> Path:
    """models/orientation/small.safetensors (whole, 12 layers, since the file's width tells their number) and
    models/clip_vision/{dino-vits16,clip}. comfyui: the checkout, for CLIP's own tokenizer."""
    import transformers

    (models / "orientation").mkdir(parents=True, exist_ok=True)
    save_file(published_state(384, 12, 180), models / "orientation" / "small.safetensors")
    clip = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION | {"patch_size": 32}, projection_dim=32)
    dino = transformers.ViTConfig(**VISION, patch_size=16, layer_norm_eps=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = transformers.ViTModel(dino, add_pooling_layer=False)
        for name, model in (("clip", transformers.CLIPModel(clip)), ("dino-vits16", vit)):
            for parameter in model.parameters():  # the library's own are so small that all pictures are alike
                parameter.data = torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5
            model.eval().save_pretrained(models / "clip_vision" / name)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (models / "clip_vision" / "clip" / name).write_bytes((comfyui / "comfy" / "sd1_tokenizer" / name).read_bytes())
    return models
