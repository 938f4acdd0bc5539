"""LongCat-Image-Edit: FLUX.1's blocks behind Qwen2.5-VL, without a pooled vector and guidance.

The host runs it by FLUX.1's class, with text positions and shifted image positions. A file of Ovis-Image, which has no
pooled vector either, norms its context.
"""

from .base import Backbone

BACKBONE = Backbone(
    name="longcat_image",
    title="LongCat-Image-Edit",
    config={"image_model": "flux", "context_in_dim": 3584, "vec_in_dim": None},
    host_class="LongCatImage",
    keys=("txt_in.weight", "img_in.weight", "double_blocks.0.img_attn.qkv.weight"),
    absent_keys=(
        "double_stream_modulation_img.lin.weight",
        "distilled_guidance_layer.in_proj.weight",  # Chroma's
        "vector_in.in_layer.weight",
        "txt_norm.weight",
        "txt_norm.scale",
    ),
    context_width=3584,
    placements=("offset", "index", "uxo", "index_timestep_zero"),
    default_placement="index",  # of its published workflow; the class's own default is FLUX.1's offset
)
