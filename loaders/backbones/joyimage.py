"""JoyImage (JoyAI-Image-Edit): double-stream blocks behind Qwen3-VL-8B, with the context last."""

from .base import Backbone

BACKBONE = Backbone(
    name="joyimage",
    title="JoyImage",
    config={"image_model": "joyimage"},
    host_class="JoyImage",
    keys=("double_blocks.0.attn.img_attn_qkv.weight", "condition_embedder.text_embedder.linear_1.weight"),
    context_layer="condition_embedder.text_embedder.linear_1",
    context_width=4096,
    token_order=("image", "reference", "context"),
    joint_blocks=("double_blocks",),
    latent_dimensions=3,
)
