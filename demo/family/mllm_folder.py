"""The demo's MLLM as a Hugging Face folder, without its weights: configuration, preprocessor, tokenizer of words."""

import json
import random
import re
from pathlib import Path

from . import world
from .layout import CONTEXT_WIDTH
from .mllm_tasks import DESCRIBE, Tasks

NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "unk")
SPECIAL = [f"<|{name}|>" for name in NAMES]
WORDS = r"\n|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"
LAYERS = 8


def write_folder(folder: Path, template) -> dict:
    """Writes config.json, preprocessor_config.json and tokenizer.json.

    Args:
        folder: Where; it is created.
        template: The chat template, whose words go into the vocabulary.

    Returns:
        The configuration.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = {token: number for number, token in enumerate((*SPECIAL, *_vocabulary(template)))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))  # noqa: S106 (a word, no password)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
        "bos_token_id": words["<|endoftext|>"], "eos_token_id": words["<|im_end|>"], "hidden_act": "silu",
        "vision_start_token_id": words["<|vision_start|>"], "vision_end_token_id": words["<|vision_end|>"],
        "vision_token_id": words["<|unk|>"], "image_token_id": words["<|image_pad|>"],
        "video_token_id": words["<|unk|>"], "hidden_size": CONTEXT_WIDTH, "initializer_range": 0.02,
        "intermediate_size": 3 * CONTEXT_WIDTH,
        "max_position_embeddings": 4096, "max_window_layers": LAYERS, "num_attention_heads": 4,
        "num_hidden_layers": LAYERS, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": True, "torch_dtype": "float16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": len(words),
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            "depth": 4, "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 384, "num_heads": 4,
            "in_chans": 3, "out_hidden_size": CONTEXT_WIDTH, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [0, 1, 2, 3],
            "tokens_per_second": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "min_pixels": 3136,
        "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    for name, value in (("config", config), ("preprocessor_config", preprocessor)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    return config


def _vocabulary(template) -> list[str]:
    draw = random.Random(0)
    texts = [template.system, template.system_images, template.text("", 2), DESCRIBE, "0 1 2 3 4 5 6 7 8 9 ? !"]
    pictures = [
        world.random_picture(draw, (world.random_toy(draw, "training"),), world.random_view(draw)) for _ in range(500)
    ]
    tasks = Tasks(pictures, "training")
    texts += [text for number in range(4000) for text in tasks[number][1:3]]
    words = {word.lower() for text in texts for word in re.findall(WORDS, re.sub(r"<\|\w+\|>", " ", text))}
    return sorted(words)
