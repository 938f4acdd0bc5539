"""Mage-Flow: Qwen-Image's blocks on latents of 16 px without patches, behind Qwen3-VL-4B."""

from .base import Backbone

BACKBONE = Backbone(
    name="mage_flow",
    title="Mage-Flow",
    config={"image_model": "mage_flow"},
    host_class="MageFlow",
    keys=("txt_in.weight", "txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    rows={"proj_out.weight": 128},  # else it is Qwen-Image
    context_width=2560,
    joint_blocks=("transformer_blocks",),
    latent_channels=128,
    latent_downscale=16,
    patch_size=1,
    placements=("index",),
    unnamed_placement="index",
)
