"""Boogu: OmniGen2 behind Qwen3-VL-8B, with double-stream blocks before the others.

These have a second attention beside the joint one, of the image and the references without the context.
"""

from .base import Backbone

BACKBONE = Backbone(
    name="boogu",
    title="Boogu",
    config={"image_model": "boogu"},
    host_class="Boogu",
    keys=(
        "time_caption_embed.timestep_embedder.linear_1.bias",
        "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",
    ),
    context_layer="time_caption_embed.caption_embedder.1",
    context_width=4096,
    token_order=("context", "reference", "image"),
    joint_blocks=("double_stream_layers", "single_stream_layers"),
    contextless_blocks=("double_stream_layers",),
    most_references=5,
    counts_context=True,
)
