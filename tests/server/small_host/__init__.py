"""A custom node pack for tests only: the host's models at sizes that a processor runs in seconds.

Sizes that the host takes for granted are read from the file here, or are the small ones below; nothing else changes.
"""

import functools
import json
from pathlib import Path

import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd1_clip
from comfy.text_encoders import llama, qwen_vl

WIDTH = 512  # of the text encoders, and so of every DiT's context
QWEN = {"vocab_size": 152064, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
QWEN |= {"num_hidden_layers": 3, "num_attention_heads": 4}
# The host tells the 7B and the 3B model apart by the width of their keys.
QWEN_7B, QWEN_3B = QWEN | {"num_key_value_heads": 4}, QWEN | {"num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_layers": 2}
T5 = {"d_model": WIDTH, "d_ff": 256, "d_kv": 64, "num_heads": 8, "num_layers": 2}
WAN_VAE = {"dim": 16}
CLIP_L = {"num_hidden_layers": 2}

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
    if config.get("image_model") == "qwen_image":
        context, width = shape("txt_in.weight")[1], shape("img_in.weight")[0]
        return {"num_attention_heads": width // 128, "joint_attention_dim": context}
    if config.get("image_model") == "omnigen2":
        query, key = (shape(f"layers.0.attn.to_{name}.weight") for name in "qk")
        return {
            "hidden_size": query[1], "num_attention_heads": query[0] // 120, "num_kv_heads": key[0] // 120,
            "num_layers": blocks("layers"), "num_refiner_layers": blocks("noise_refiner"),
            "text_feat_dim": shape("time_caption_embed.caption_embedder.1.weight")[1],
        }  # fmt: skip
    return {}


def read_sizes_from_file() -> None:
    detect = comfy.model_detection.detect_unet_config

    def detect_unet_config(state_dict, key_prefix, *args, **kwargs):
        config = detect(state_dict, key_prefix, *args, **kwargs)
        return config and {**config, **sizes(state_dict, key_prefix, config)}

    comfy.model_detection.detect_unet_config = detect_unet_config


def shrink_text_encoders() -> None:
    for config, small in ((llama.Qwen25_7BVLI_Config, QWEN_7B), (llama.Qwen25_3BConfig, QWEN_3B)):
        defaults = dict(zip(config.__dataclass_fields__, config.__init__.__defaults__, strict=True))
        config.__init__.__defaults__ = tuple((defaults | small).values())

    vision = qwen_vl.Qwen2VLVisionTransformer.__init__

    def small_vision(self, *args, **kwargs):
        small = {} if "num_layers" in kwargs else VISION  # whoever says how deep does not mean the published model
        vision(self, *args, **kwargs | small)
        self.fullatt_block_indexes = [1]

    qwen_vl.Qwen2VLVisionTransformer.__init__ = small_vision

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


def shrink_host() -> None:
    read_sizes_from_file()
    shrink_text_encoders()
    shrink_vae()


if not __name__.startswith("subject_dla."):  # the host's import of a custom node; tests choose what they need
    shrink_host()
