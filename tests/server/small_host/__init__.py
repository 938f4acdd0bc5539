"""A custom node pack for tests only: the host's models at sizes that a processor runs in seconds.

Sizes that the host takes for granted are read from the file here, or are the small ones below; nothing else changes.
"""

import functools
import json
import sys
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
from comfy.text_encoders import llama, qwen_vl

WIDTH = 512  # of T5's tokens
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_layers": 2}
VISION_3 = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
T5 = {"d_model": WIDTH, "d_ff": 256, "d_kv": 64, "num_heads": 8, "num_layers": 2}
WAN_VAE = {"dim": 8}
KL_VAE = {"ch": 32}
CLIP_L = {"num_hidden_layers": 2}
KREA_WIDTH = 320  # of a Qwen3-VL 4B for Krea 2, whose DiT has blocks of the encoder's width
SIGLIP = Path(__file__).with_name("siglip.json")
SIGLIP_PROJECTOR = {"siglip_token_dims": 64, "hidden_size": 256}  # SigLIP's width; that of FLUX.1's blocks

NODE_CLASS_MAPPINGS = {}


def sizes(state_dict: dict, prefix: str, config: dict) -> dict:
    """The sizes of a DiT that the host takes for granted, read from the weights."""

    def shape(key):
        return state_dict[prefix + key].shape

    def blocks(name):
        return len({key[len(prefix) :].split(".")[1] for key in state_dict if key.startswith(f"{prefix}{name}.")})

    if config.get("image_model") in ("flux", "flux2"):
        context, width = shape("txt_in.weight")[1], shape("img_in.weight")[0]
        return {"hidden_size": width, "num_heads": width // 128, "context_in_dim": context}
    if config.get("image_model") in ("qwen_image", "mage_flow"):
        context, width = shape("txt_in.weight")[1], shape("img_in.weight")[0]
        return {"num_attention_heads": width // 128, "joint_attention_dim": context}
    if config.get("image_model") == "omnigen2":
        query, key = (shape(f"layers.0.attn.to_{name}.weight") for name in "qk")
        return {
            "hidden_size": query[1], "num_attention_heads": query[0] // 120, "num_kv_heads": key[0] // 120,
            "num_layers": blocks("layers"), "num_refiner_layers": blocks("noise_refiner"),
            "text_feat_dim": shape("time_caption_embed.caption_embedder.1.weight")[1],
        }  # fmt: skip
    if config.get("image_model") == "boogu":
        query, key = (shape(f"single_stream_layers.0.attn.to_{name}.weight") for name in "qk")
        return {"num_attention_heads": query[0] // 120, "num_kv_heads": key[0] // 120}
    return {}


def read_sizes_from_file() -> None:
    detect = comfy.model_detection.detect_unet_config

    def detect_unet_config(state_dict, key_prefix, *args, **kwargs):
        config = detect(state_dict, key_prefix, *args, **kwargs)
        return config and {**config, **sizes(state_dict, key_prefix, config)}

    comfy.model_detection.detect_unet_config = detect_unet_config


def language_model_sizes(state_dicts: list[dict]) -> dict[str, int]:
    """Sizes of a text encoder that is a language model, from its weights; {} for others."""
    for weights in state_dicts:
        for prefix in ("model.", "model.language_model."):
            if f"{prefix}layers.0.self_attn.q_proj.weight" not in weights:
                continue
            first = f"{prefix}layers.0."
            vocabulary, width = weights[f"{prefix}embed_tokens.weight"].shape
            query, key = (weights[f"{first}self_attn.{name}_proj.weight"].shape[0] for name in "qk")
            layers = {key.removeprefix(prefix).split(".")[1] for key in weights if key.startswith(f"{prefix}layers.")}
            return {
                "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": len(layers),
                "intermediate_size": weights[f"{first}mlp.gate_proj.weight"].shape[0],
                "num_attention_heads": query // 128, "num_key_value_heads": key // 128,
            }  # fmt: skip
    return {}


def read_language_models_from_file() -> None:
    load, detect, embed = comfy.sd.load_text_encoder_state_dicts, comfy.sd.detect_te_model, llama.Llama2_.__init__
    configs = [c for c in vars(llama).values() if is_dataclass(c) and "num_hidden_layers" in c.__dataclass_fields__]

    def load_text_encoder_state_dicts(state_dicts, *args, **kwargs):
        sizes = language_model_sizes(state_dicts)
        for config in configs:
            defaults = dict(zip(config.__dataclass_fields__, config.__init__.__defaults__, strict=True))
            config.__init__.__defaults__ = tuple((defaults | sizes).values())
        return load(state_dicts, *args, **kwargs)

    def detect_te_model(state_dict):
        krea = getattr(state_dict.get("model.visual.merger.linear_fc2.weight"), "shape", [0])[0] == KREA_WIDTH
        return comfy.sd.TEModel.QWEN3VL_4B if krea else detect(state_dict)

    def init(self, *args, **kwargs):  # a small vocabulary has every token more than once
        embed(self, *args, **kwargs)
        rows = self.embed_tokens.weight.shape[0]
        self.embed_tokens.register_forward_pre_hook(lambda _, args: (args[0] % rows, *args[1:]))

    comfy.sd.load_text_encoder_state_dicts, comfy.sd.detect_te_model = load_text_encoder_state_dicts, detect_te_model
    llama.Llama2_.__init__ = init


def shrink_vision() -> None:
    vision = qwen_vl.Qwen2VLVisionTransformer.__init__

    def small_vision(self, *args, **kwargs):
        small = {} if "num_layers" in kwargs else VISION  # whoever says how deep does not mean the published model
        vision(self, *args, **kwargs | small)
        self.fullatt_block_indexes = [1]

    qwen_vl.Qwen2VLVisionTransformer.__init__ = small_vision
    if find_spec("comfy.text_encoders.qwen3vl"):
        qwen3vl = import_module("comfy.text_encoders.qwen3vl")
        qwen3vl.QWEN3VL_VISION_COMMON |= {"num_heads": 2, "num_position_embeddings": 64}
        for sizes in qwen3vl.QWEN3VL_VISION.values():
            sizes |= VISION_3

    siglip = comfy.clip_vision.ClipVisionModel.__init__
    comfy.clip_vision.ClipVisionModel.__init__ = lambda self, json_config: siglip(self, str(SIGLIP))
    loader = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get("ModelPatchLoader")
    if loader:
        projector = loader.load_model_patch.__globals__["SigLIPMultiFeatProjModel"]
        projector.__init__ = functools.partialmethod(projector.__init__, **SIGLIP_PROJECTOR)


def shrink_text_encoders() -> None:
    text = comfy.sd1_clip.SDClipModel.__init__

    def small_text(self, *args, textmodel_json_config=None, model_options=None, **kwargs):
        if textmodel_json_config is None:
            textmodel_json_config = str(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json"))
            model_options = {"model_name": "clip_l", **(model_options or {})}
        small = {"t5_config_xxl.json": T5, "sd1_clip_config.json": CLIP_L}.get(Path(str(textmodel_json_config)).name)
        if small:
            textmodel_json_config = json.loads(Path(textmodel_json_config).read_text()) | small
        text(self, *args, textmodel_json_config=textmodel_json_config, model_options=model_options or {}, **kwargs)

    comfy.sd1_clip.SDClipModel.__init__ = small_text


def shrink_vae() -> None:
    vae = comfy.ldm.wan.vae.WanVAE.__init__

    @functools.wraps(vae)
    def small_vae(self, *args, **kwargs):
        vae(self, *args, **kwargs | WAN_VAE)

    comfy.ldm.wan.vae.WanVAE.__init__ = small_vae

    kl = comfy.ldm.models.autoencoder.AutoencoderKL.__init__

    def small_kl(self, *args, ddconfig, **kwargs):
        kl(self, *args, ddconfig=ddconfig | KL_VAE, **kwargs)

    comfy.ldm.models.autoencoder.AutoencoderKL.__init__ = small_kl


def mask_where_masked() -> None:
    """The host's kernel for processors adds the ones of Qwen-Image 2.1's causal mask to the logits."""
    if find_spec("comfy.ldm.qwen_image21"):
        model, attention = (import_module(f"comfy.ldm.{name}") for name in ("qwen_image21.model", "modules.attention"))
        model.optimized_attention = attention.attention_pytorch


def shrink_host() -> None:
    read_sizes_from_file()
    read_language_models_from_file()
    shrink_vision()
    shrink_text_encoders()
    shrink_vae()
    mask_where_masked()


if not __name__.startswith("subject_dla."):  # the host's import of a custom node; tests choose what they need
    shrink_host()
