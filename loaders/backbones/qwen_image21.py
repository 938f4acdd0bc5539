"""Qwen-Image 2.1: one stream of the context with the references inside it, and the picture last.

The host's encode node drops an image's vision tokens from the context where a reference latent comes for it, and says
in `image_slots` before which context token each goes; further references follow the context. Attention is causal in
blocks, one call each: a piece of the context reads what is before it and itself token by token, a reference what is
before it and itself, the picture everything. So nothing before the picture depends on it, nor on the time, at which
the host modulates these tokens as at 0: it keeps their keys and values over the steps (prefix cache), unless Qwen
Image 2.1 Cache switches that off.

Without the vision tokens, a condition cannot do without its references: it needs a second encode that keeps them.

Source: the host's ldm/qwen_image21, text_encoders/qwen_image21 and nodes_qwen, of 0.37.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

from .base import Backbone, DiTSizes, Grid, MLLMSizes, Part, Training


def measure(module: Any) -> DiTSizes:
    """The sizes of a loaded Qwen-Image 2.1."""
    first, width = module.transformer_blocks[0], module.inner_dim
    return DiTSizes(
        width,
        mlp=first.img_mlp.out.in_features,
        keys=width,
        blocks=len(module.transformer_blocks),
        parameters=sum(p.numel() for p in module.parameters()),
        head=width // first.attn.heads,
        streams=1,
        gated=first.img_mlp.fused,
        pieces=True,
    )


def token_parts(
    module: Any, context: int, image: Grid, references: list[Grid], shapes: Mapping[str, Any]
) -> list[Part]:
    """Pieces of the context with a reference after each, and the image after the last."""
    slots = [*shapes.get("image_slots", ()), *[context] * len(references)][: len(references)]
    texts = [Part("context", end - start) for start, end in pairwise([0, *slots, context])]
    others = [Part("reference", prod(size), size, index) for index, size in enumerate(references)]
    pairs = zip(texts, [*others, Part("image", prod(image), image)])
    return [part for pair in pairs for part in pair if part.tokens]


BACKBONE = Backbone(
    name="qwen_image21",
    title="Qwen-Image 2.1",
    config={"image_model": "qwen_image21"},
    host_class="QwenImage21",
    keys=("txt_in.text_norm.weight", "modulation.1.weight", "transformer_blocks.0.attn.norm_q.weight"),
    context_layer="txt_in.in_layer",
    context_width=4096,
    token_order=("context", "reference", "image"),
    token_parts=token_parts,
    references_in_context=True,
    joint_blocks=("transformer_blocks",),
    latent_channels=64,
    latent_downscale=16,
    patch_size=1,
    reference_side=32,  # a vision token of the MLLM
    context_off_tokens=0,
    training=Training(
        release="Qwen-Image 2.1",
        sizes=DiTSizes(4096, 12288, 4096, blocks=32, parameters=7_115_124_736, streams=1, gated=True, pieces=True),
        measure=measure,
        mllm=MLLMSizes("Qwen3-VL-8B", 36, 4096, 8_140_000_000),
        blocks=("transformer_blocks",),
        lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
    ),
)
