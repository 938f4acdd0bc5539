"""Qwen-Image, Edit, 2509, 2511 and Layered."""

from .base import Backbone, DiTSizes, MLLMSizes, Release, Training


def measure(module) -> DiTSizes:
    """The sizes of a loaded Qwen-Image."""
    first, width = module.transformer_blocks[0], module.inner_dim
    return DiTSizes(
        width,
        mlp=first.img_mlp.net[0].proj.out_features,
        keys=width,
        blocks=len(module.transformer_blocks),
        parameters=sum(p.numel() for p in module.parameters()),
        head=first.attention_head_dim,
    )


BACKBONE = Backbone(
    name="qwen_image",
    title="Qwen-Image",
    config={"image_model": "qwen_image"},
    host_class="QwenImage",
    keys=("txt_in.weight", "txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    context_width=3584,
    joint_blocks=("transformer_blocks",),
    latent_dimensions=3,
    placements=("index", "negative_index", "index_timestep_zero"),
    releases=(Release("Qwen-Image-Edit 2511", r"(?<!\d)2511(?!\d)", ("index_timestep_zero",)),),
    training=Training(
        release="Qwen-Image",
        sizes=DiTSizes(3072, 12288, 3072, blocks=60, parameters=20_430_401_088),
        measure=measure,
        mllm=MLLMSizes("Qwen2.5-VL-7B", 28, 3584, 7_750_000_000),
        blocks=("transformer_blocks",),
        lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    ),
)
