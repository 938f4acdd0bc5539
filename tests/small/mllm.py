"""Tiny MLLM folders with random weights, laid out as the published repositories are: config, keys, tokenizer."""

from __future__ import annotations

import json
import os
import re
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 151643  # of Qwen2.5, without added tokens
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 151652, 151653, 151655, 151656
IMG_CONTEXT = 151667


def build_qwen25vl(folder, *, width=64, layers=3, heads=4, kv_heads=2, seed=0, dtype=torch.bfloat16, shards=1) -> Path:
    """Qwen2.5-VL as Qwen/Qwen2.5-VL-7B-Instruct lays it out: flat config, keys "model.layers…", "visual…"."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END, "vision_token_id": 151654,
        "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD, "hidden_act": "silu", "hidden_size": width,
        "initializer_range": 0.02, "intermediate_size": 2 * width, "max_position_embeddings": 128000,
        "max_window_layers": layers, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": False, "torch_dtype": _name(dtype), "use_cache": True, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": _mrope(width // heads, (2, 3, 3))}, "vocab_size": 152064,
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3,
            "out_hidden_size": width, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "min_pixels": 3136,
        "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    layout = {"language_model.": "model."}
    return _build(folder, config, processor, layout, "lm_head.weight", (), seed, dtype, shards)


# of Qwen3-VL and Qwen3.5
QWEN3_VL_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "patch_size": 16,
    "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
QWEN3_VL_LAYOUT = {"language_model.": "model.language_model.", "visual.": "model.visual."}


def build_qwen3vl(folder, *, width=64, layers=4, heads=4, kv_heads=2, seed=0, dtype=torch.bfloat16, shards=1) -> Path:
    """Qwen3-VL as Qwen/Qwen3-VL-8B-Instruct lays it out: keys "model.language_model…", DeepStack."""
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151645, "dtype": _name(dtype), "head_dim": width // heads, "hidden_act": "silu",
            "hidden_size": width, "initializer_range": 0.02, "intermediate_size": 2 * width,
            "max_position_embeddings": 262144, "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-06, "rope_theta": 5000000, "use_cache": True,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": _mrope(width // heads, (24, 20, 20)),
                             "rope_type": "default"}, "vocab_size": 151936,
        },
        "vision_config": {
            "model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 1], "depth": 3, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 48, "num_heads": 2,
            "num_position_embeddings": 64, "out_hidden_size": width, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip
    return _build(folder, config, QWEN3_VL_PROCESSOR, QWEN3_VL_LAYOUT, "lm_head.weight", (), seed, dtype, shards)


def build_qwen35(
    folder, *, width=64, layers=4, heads=4, kv_heads=2, seed=0, dtype=torch.bfloat16, shards=1, **text
) -> Path:
    """Qwen3.5 as Qwen/Qwen3.5-4B lays it out: layers of linear attention and of full, and weights "mtp…".

    text: other settings of its text_config.
    """
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_text", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
            "dtype": _name(dtype), "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 32,
            "hidden_act": "silu", "hidden_size": width, "initializer_range": 0.02, "intermediate_size": 2 * width,
            "layer_types": ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(layers)],
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_value_head_dim": 16, "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 262144, "mtp_num_hidden_layers": 1, "num_attention_heads": heads,
            "num_hidden_layers": layers, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-06, "use_cache": True,
            "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25,
                                "rope_theta": 10000000, "rope_type": "default"}, "vocab_size": 151936,
            **text,
        },
        "vision_config": {
            "model_type": "qwen3_5", "deepstack_visual_indexes": [], "depth": 2, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 48, "num_heads": 2,
            "num_position_embeddings": 64, "out_hidden_size": width, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip
    extra = {"mtp.fc.weight": (width, 2 * width), "mtp.layers.0.mlp.up_proj.weight": (2 * width, width)}
    around_zero = r"(layernorm|[qk]_norm|language_model\.norm)\.weight"  # these norms scale by 1 + weight
    processor, layout = QWEN3_VL_PROCESSOR, QWEN3_VL_LAYOUT
    return _build(folder, config, processor, layout, "lm_head.weight", (), seed, dtype, shards, extra, around_zero)


GEMMA4_TOKENS = ("<bos>", "<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>")


def build_gemma4(
    folder, *, width=64, layers=6, heads=4, kv_heads=2, seed=0, dtype=torch.bfloat16, shards=1, large=False
) -> Path:
    """Gemma 4 as google/gemma-4-E4B-it lays it out, with audio, or `large` as google/gemma-4-31B-it does.

    The first has embeddings of each layer, clipped layers in its vision tower, and keys that layers share. In the
    second, tokens of an image see each other, and layers of full attention have one matrix for keys and values.
    """
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (layers // 3)
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "dtype": _name(dtype),
        "boi_token_id": 151668, "image_token_id": 151669, "eoi_token_id": 151670, "audio_token_id": 151671,
        "video_token_id": 151672, "tie_word_embeddings": True,
        "audio_config": None if large else {
            "model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "output_proj_dims": 32, "subsampling_conv_channels": [8, 4],
        },
        "text_config": {
            "model_type": "gemma4_text", "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": large,
            "bos_token_id": 151665, "dtype": _name(dtype), "enable_moe_block": False, "eos_token_id": 151645,
            "global_head_dim": 32, "head_dim": 16,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": width,
            "hidden_size_per_layer_input": 0 if large else 8, "initializer_range": 0.02, "intermediate_size": 2 * width,
            "layer_types": kinds, "max_position_embeddings": 131072, "num_attention_heads": heads,
            "num_global_key_value_heads": 1 if large else None, "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads, "num_kv_shared_layers": 0 if large else layers // 2, "pad_token_id": 0,
            "rms_norm_eps": 1e-06, "sliding_window": 20, "tie_word_embeddings": True,
            "use_bidirectional_attention": "vision" if large else None, "use_cache": True,
            "use_double_wide_mlp": not large, "vocab_size": 151680, "vocab_size_per_layer_input": 151680,
            "rope_parameters": {
                "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
        "vision_config": {
            "model_type": "gemma4_vision", "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32,
            "intermediate_size": 48, "max_position_embeddings": 131072, "num_attention_heads": 2,
            "num_hidden_layers": 2, "num_key_value_heads": 2, "patch_size": 16, "pooling_kernel_size": 3,
            "position_embedding_size": 64, "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 100.0,
            "rope_type": "default"}, "standardize": large, "use_clipped_linears": not large,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "Gemma4ImageProcessor", "processor_class": "Gemma4Processor", "patch_size": 16,
        "max_soft_tokens": 280, "pooling_kernel_size": 3, "do_normalize": False,
    }  # fmt: skip
    parts = ("language_model.", "vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
    layout = {part: f"model.{part}" for part in parts}
    unused = range(layers // 2, layers) if not large else ()
    extra = {f"model.language_model.layers.{layer}.self_attn.k_norm.weight": (16,) for layer in unused}
    return _build(folder, config, processor, layout, "lm_head.weight", GEMMA4_TOKENS, seed, dtype, shards, extra)


def build_gemma4_31b(folder, **options) -> Path:
    """Gemma 4 as google/gemma-4-31B-it lays it out."""
    return build_gemma4(folder, large=True, **options)


def build_internvl35(folder, **options) -> Path:
    """InternVL3.5 as OpenGVLab/InternVL3_5-8B-HF lays it out: as InternVL3, with Qwen3 as its LLM."""
    return build_internvl(folder, model_type="qwen3", **options)


def build_internvl(
    folder, *, width=64, layers=3, heads=4, kv_heads=2, seed=0, dtype=torch.bfloat16, shards=1, model_type="qwen2"
) -> Path:
    """InternVL3 as OpenGVLab/InternVL3-8B-hf lays it out: "language_model.model…", "vision_tower…", projector."""
    config = {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "downsample_ratio": 0.5,
        "image_seq_length": 4, "image_token_id": IMG_CONTEXT, "projector_hidden_act": "gelu",
        "torch_dtype": _name(dtype), "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": model_type, "head_dim": width // heads, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": width,
            "initializer_range": 0.02, "intermediate_size": 2 * width, "max_position_embeddings": 32768,
            "max_window_layers": 70, "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic"},
            "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": _name(dtype), "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151674, "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "internvl_vision", "architectures": ["InternVisionModel"], "attention_bias": True,
            "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
            "hidden_size": 32, "image_size": [56, 56], "initializer_factor": 0.1, "initializer_range": 1e-10,
            "intermediate_size": 64, "layer_norm_eps": 1e-06, "layer_scale_init_value": 0.1, "norm_type": "layer_norm",
            "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": [14, 14],
            "projection_dropout": 0.0, "torch_dtype": _name(dtype), "use_absolute_position_embeddings": True,
            "use_mask_token": False, "use_mean_pooling": True, "use_qk_norm": False,
        },
    }  # fmt: skip
    processor = {
        "image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor",
        "crop_to_patches": False, "min_patches": 1, "max_patches": 12, "size": {"height": 56, "width": 56},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    more = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
    layout = {"language_model.": "language_model.model."}
    head = "language_model.lm_head.weight"
    return _build(folder, config, processor, layout, head, more, seed, dtype, shards)


def _build(
    folder, config, processor, layout, head, more_tokens, seed, dtype, shards, extra=None, around_zero="(?!)"
) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", processor)
    source = Path(os.environ["COMFYUI_PATH"], "comfy", "text_encoders", "qwen25_tokenizer")  # the host's own
    _write_tokenizer(folder, source, more_tokens, processor["processor_class"])
    import transformers

    model_config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        state = transformers.AutoModel.from_config(model_config).state_dict()
    text = config.get("text_config", config)
    shapes = {key: value.shape for key, value in state.items()}
    shapes["lm_head.weight"] = torch.Size((text["vocab_size"], text["hidden_size"]))
    shapes |= {key: torch.Size(shape) for key, shape in (extra or {}).items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {key: _random(key, shape, generator) - len(re.findall(around_zero, key)) for key, shape in shapes.items()}
    weights = {_published(key, layout, head): weight.to(dtype) for key, weight in weights.items()}
    _save(folder, weights, shards)
    return folder


def _random(key, shape, generator):
    # a processor draws a thousand million normal numbers in half a minute: the tables of words repeat some
    drawn = torch.randn(min(prod(shape), 2**24 + 7), generator=generator)  # small ones are those of 0.1.0
    noise = drawn.repeat(-(-prod(shape) // max(drawn.numel(), 1)))[: prod(shape)].reshape(shape)
    if re.search(r"(norm\w*|ln_q)\.weight$", key):
        return 1 + 0.1 * noise
    if key.endswith(("lambda_1", "lambda_2")):
        return 0.5 + 0.1 * noise
    if key.endswith(("put_min", "put_max")):  # of clipped layers: near what they clip
        return torch.tensor(-1.0 if key.endswith("min") else 1.0)
    if key.endswith(("layer_scalar", "std_scale")):
        return 0.9 + 0.1 * noise
    if noise.ndim < 2 or "cls_token" in key or "position_embedding_table" in key or "position_embeddings" in key:
        return 0.1 * noise
    if "embed" in key and "patch" not in key:
        return 0.5 * noise
    return noise / shape[1:].numel() ** 0.5


def _published(key, layout, head):
    for ours, theirs in {"lm_head.weight": head, **layout}.items():
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    return key


def _save(folder, weights, shards):
    if shards == 1:
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    parts = [dict(list(weights.items())[i::shards]) for i in range(shards)]
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, str(folder / name), metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
    size = sum(weight.nbytes for weight in weights.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def _write_tokenizer(folder, source, more, processor):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    lines = (source / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    added = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    last = 151664  # of Qwen2.5; InternVL's own follow
    tokens = [added.get(str(i), {"content": f"<|unused_{i}|>", "special": True}) for i in range(VOCABULARY, last + 1)]
    tokens += [{"content": token, "special": True} for token in more]
    decoder = {}
    for index, token in enumerate(tokens, VOCABULARY):
        tokenizer.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
        if (found := tokenizer.token_to_id(token["content"])) != index:
            raise RuntimeError(f"{token['content']} became {found}, expected {index}.")
        decoder[str(index)] = {**token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder, "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>", "processor_class": processor,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    if "<img>" in more:
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"}  # fmt: skip
        config |= {"extra_special_tokens": names, **names}
    _write(folder / "tokenizer_config.json", config)


def _mrope(head_dim, shares):
    unit = head_dim // 2 / sum(shares)
    sections = [int(share * unit) for share in shares]
    sections[0] += head_dim // 2 - sum(sections)
    return sections


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _write(path, value):
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def shrink_qwen25vl_vision(monkeypatch) -> None:
    """The host's own vision tower of Qwen2.5-VL, as small as that of `build_qwen25vl`."""
    import comfy.text_encoders.qwen_vl as qwen_vl

    original = qwen_vl.Qwen2VLVisionTransformer.__init__

    def small(self, *args, **kwargs):
        if kwargs.get("num_layers") != 0:
            kwargs |= {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_layers": 2}
        original(self, *args, **kwargs)
        self.fullatt_block_indexes = [1]

    monkeypatch.setattr(qwen_vl.Qwen2VLVisionTransformer, "__init__", small)
