"""Small random model files of every kind that the official edit templates load, as far as the host has their classes.

    python common/bootstrap.py tests.small.template_models COMFYUI OUT KIND ...

writes OUT/FOLDER/KIND.safetensors, and on standard output a JSON object of the kinds that this host lacks, with why.
Context widths are the published ones: by them the host and the pack tell families apart. See `tests/server/small_host`.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...common.bootstrap import start_host
from . import dit
from .models import FLUX2, WAN_VAE, host_shapes, kl_vae, random_like, text_encoder_shapes

LLAMA = "text_encoders.llama"
MISTRAL_SPECIAL = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]


class Lacking(Exception):
    """The host has no such class."""


def of_host(module: str, name: str):
    try:
        return getattr(importlib.import_module(f"comfy.{module}"), name)
    except (ModuleNotFoundError, AttributeError):
        raise Lacking(f"comfy.{module} has no {name}") from None


def flux(context: int, family: str = "flux", **sizes) -> dict[str, torch.Tensor]:
    sizes = {"hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 2} | sizes
    name = "_norm.weight" if family == "longcat_image" else "_norm.scale"  # of its norms, in published files
    weights = known(family, context_in_dim=context, **sizes)
    return {key.replace("_norm.weight", name): value for key, value in weights.items()}


def known(family: str, **sizes) -> dict[str, torch.Tensor]:
    """Weights of a DiT of a family that the pack has a record of."""
    if not dit.on_this_host(family):
        raise Lacking(f"the host has no {family}")
    return random_like(dit.build(family, sizes).state_dict())


def qwen_layered(**sizes) -> dict[str, torch.Tensor]:
    build = of_host("ldm.qwen_image.model", "QwenImageTransformer2DModel")
    if "use_additional_t_cond" not in inspect.signature(build).parameters:
        raise Lacking("the host's Qwen-Image has no layers")
    return known("qwen_image", use_additional_t_cond=True, **sizes)


def language_model(name: str, **sizes) -> dict[str, torch.Tensor]:
    """A text encoder of the host, by its class or, for Qwen3-VL, its type."""
    import comfy.ops

    vision = name.startswith("qwen3vl")
    build = of_host("text_encoders.qwen3vl", "_make_qwen3vl_model")(name) if vision else of_host(LLAMA, name)
    sizes = {"vocab_size": 512, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1} | sizes
    return random_like(build(sizes, torch.bfloat16, "meta", comfy.ops.disable_weight_init).state_dict())


def qwen3_vl(kind: str, width: int, layers: int) -> dict[str, torch.Tensor]:
    weights = language_model(kind, hidden_size=width, num_hidden_layers=layers)
    names = {"model.lm_head.": "lm_head.", "model.": "model.language_model.", "visual.": "model.visual."}
    first = {key: next(name for name in names if key.startswith(name)) for key in weights}
    return {names[first[key]] + key.removeprefix(first[key]): value for key, value in weights.items()}


def mistral() -> dict[str, torch.Tensor]:
    """Mistral3-24B without its last ten layers, as for FLUX.2, with a tokenizer of single bytes."""
    weights = language_model("Mistral3Small24B", hidden_size=5120, num_hidden_layers=30, final_norm=False)
    return weights | {"tekken_model": mistral_tokenizer()}


def mistral_tokenizer() -> torch.Tensor:
    """A tokenizer file for it, of single bytes."""
    special = [{"rank": rank, "token_str": text} for rank, text in enumerate(["<unk>", "<s>", *MISTRAL_SPECIAL])]
    special += [{"rank": rank, "token_str": f"<{rank}>"} for rank in range(len(special), 20)]
    vocabulary = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"default_num_special_tokens": 20, "default_vocab_size": 276, "pattern": r"\s+|\S+"}
    text = json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def klein(width: int) -> dict[str, torch.Tensor]:
    of_host("text_encoders.flux", "klein_te")  # a host without this text encoder has no Klein
    return flux(width, family="flux2", guidance_embed=False, **FLUX2)


def checkpoint() -> dict[str, torch.Tensor]:
    """FLUX.1 in one file."""
    parts = {
        "model.diffusion_model.": flux(512),
        "text_encoders.clip_l.transformer.": random_like(text_encoder_shapes("clip_l")),
        "text_encoders.t5xxl.transformer.": random_like(text_encoder_shapes("t5xxl")),
        "vae.": taesd(),
    }
    return {prefix + key: value for prefix, weights in parts.items() for key, value in weights.items()}


def taesd() -> dict[str, torch.Tensor]:
    return random_like(host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16}), torch.float32)


def wan(**channels) -> dict[str, torch.Tensor]:
    from ..server import small_host

    sizes = WAN_VAE | small_host.WAN_VAE | channels
    return random_like(host_shapes("comfy.ldm.wan.vae", "WanVAE", sizes), torch.float32)


def wan_21() -> dict[str, torch.Tensor]:
    """The VAE of Qwen-Image 2.1: Wan 2.2's layout for one frame, with alpha."""
    if "temporal_kernel" not in inspect.signature(of_host("ldm.wan.vae2_2", "WanVAE")).parameters:
        raise Lacking("the host's Wan 2.2 VAE has frames only")
    weights = host_shapes("comfy.ldm.wan.vae2_2", "WanVAE", WAN_VAE_21)
    return random_like(weights, torch.float32)


def mage_vae() -> dict[str, torch.Tensor]:
    of_host("ldm.mage_flow.vae", "MageVAE")
    weights = random_like(host_shapes("comfy.ldm.mage_flow.vae", "MageVAE", {}))
    names = {"dconv_encoder": "student.dconv_encoder", "decoder_model": "pipeline"}
    return {names[key.split(".")[0]] + "." + key.split(".", 1)[1]: value for key, value in weights.items()}


def siglip() -> dict[str, torch.Tensor]:
    import comfy.clip_vision

    return random_like(comfy.clip_vision.ClipVisionModel("").model.state_dict())


def uso_projector() -> dict[str, torch.Tensor]:
    import comfy.ops

    from ..server.small_host import SIGLIP_PROJECTOR

    build = importlib.import_module("comfy_extras.nodes_model_patch").SigLIPMultiFeatProjModel
    state = build(**SIGLIP_PROJECTOR, operations=comfy.ops.disable_weight_init).state_dict()
    return {f"feature_embedder.{key}": value for key, value in random_like(state).items()}


def lora() -> dict[str, torch.Tensor]:
    """On the first block of FLUX.1 and of Qwen-Image."""
    keys = "double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"
    sides = {"lora_A": (4, 256), "lora_B": (256, 4)}
    state = {f"diffusion_model.{k}.{side}.weight": torch.empty(s) for k in keys for side, s in sides.items()}
    return random_like(state)


QWEN = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
HEADS = {"num_layers": 2, "num_attention_heads": 2}
BOOGU = {"hidden_size": 240, "num_attention_heads": 2, "num_kv_heads": 1, "num_refiner_layers": 1}
BOOGU |= {"num_layers": 1, "num_double_stream_layers": 1}
KREA = {"features": 256, "heads": 2, "kvheads": 1, "layers": 2, "txtdim": 320}
WAN_VAE_21 = {
    "dim": 8, "dec_dim": 8, "z_dim": 64, "dim_mult": [1, 2, 4, 8, 8], "temperal_downsample": [False, True, True, True],
    "image_channels": 4, "patch_size": 1, "temporal_kernel": 1,
}  # fmt: skip
KINDS = {  # folder of models -> kind -> what makes its weights
    "diffusion_models": {
        "flux": partial(flux, 512),
        "flux2": partial(flux, 15360, "flux2", **FLUX2),
        "klein_4b": partial(klein, 7680),
        "klein_9b": partial(klein, 12288),
        "longcat": partial(flux, 3584, "longcat_image"),
        "qwen_image": partial(known, "qwen_image", **HEADS),
        "qwen_layered": partial(qwen_layered, **HEADS),
        "omnigen2": partial(known, "omnigen2", hidden_size=240, num_attention_heads=2, num_kv_heads=1),
        "krea2": partial(known, "krea2", **KREA),
        "boogu": partial(known, "boogu", **BOOGU),
        "mage_flow": partial(known, "mage_flow", **HEADS),
        "joyimage": partial(known, "joyimage", hidden_size=256, **HEADS),
        "qwen_image21": partial(known, "qwen_image21", **HEADS),
    },
    "text_encoders": {
        "t5xxl": lambda: random_like(text_encoder_shapes("t5xxl")),
        "clip_l": lambda: random_like(text_encoder_shapes("clip_l")),
        # the host tells the 7B and the 3B model apart by the width of their keys
        "qwen25_7b": partial(language_model, "Qwen25_7BVLI", hidden_size=3584, num_key_value_heads=4, **QWEN),
        "qwen25_3b": partial(language_model, "Qwen25_3B", hidden_size=2048, num_key_value_heads=2, **QWEN),
        "qwen3_4b": partial(language_model, "Qwen3_4B", hidden_size=2560, num_hidden_layers=28),
        "qwen3_8b": partial(language_model, "Qwen3_8B", hidden_size=4096, num_hidden_layers=28),
        "qwen3vl_4b": partial(qwen3_vl, "qwen3vl_4b", 2560, 3),
        "qwen3vl_8b": partial(qwen3_vl, "qwen3vl_8b", 4096, 3),
        "qwen3vl_krea": partial(qwen3_vl, "qwen3vl_4b", 320, 36),
        "mistral": mistral,
    },
    "vae": {
        "taesd": taesd,
        "wan": wan,
        "wan_21": wan_21,
        "wan_rgba": partial(wan, image_channels=4, conv_out_channels=4),
        "kl_flux2": kl_vae,
        "mage_vae": mage_vae,
    },
    "checkpoints": {"flux_checkpoint": checkpoint},
    "clip_vision": {"siglip": siglip},
    "model_patches": {"uso_projector": uso_projector},
    "loras": {"lora": lora},
}


def main(comfyui: str, out: str | Path, *kinds: str) -> None:
    start_host(comfyui)
    from ..server import small_host

    small_host.shrink_host()
    lacking = dict.fromkeys(kinds, "no small file of this kind")
    for folder, made in KINDS.items():
        for kind in made.keys() & lacking.keys():
            try:
                weights = made[kind]()
            except Lacking as error:
                lacking[kind] = str(error)
                continue
            del lacking[kind]
            Path(out, folder).mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in weights.items()}, Path(out, folder, f"{kind}.safetensors"))
    print(json.dumps(lacking))


if __name__ == "__main__":
    main(*sys.argv[1:])
