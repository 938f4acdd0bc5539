"""Krea 2: single-stream blocks behind twelve layers of Qwen3-VL-4B, which the DiT pools itself.

The host reads references only where a condition says how to place them, and takes any method that it does not name
for *index*.
"""

from .base import Backbone

BACKBONE = Backbone(
    name="krea2",
    title="Krea 2",
    config={"image_model": "krea2"},
    host_class="Krea2",
    keys=("txtfusion.projector.weight", "blocks.0.attn.wq.weight"),
    context_layer="txtmlp.1",
    stacked_by="txtfusion.projector",
    context_width=30720,  # twelve layers of 2560
    joint_blocks=("blocks",),
    latent_dimensions=3,
    placements=("index", "index_timestep_zero"),
    unnamed_placement="index",
    default_placement="index_timestep_zero",  # of its published workflow
    needs_placement=True,
)
