"""FLUX.2: dev and Klein."""

from .base import Backbone

BACKBONE = Backbone(
    name="flux2",
    title="FLUX.2",
    config={"image_model": "flux2"},
    host_class="Flux2",
    keys=("txt_in.weight", "double_stream_modulation_img.lin.weight"),
    context_width=15360,  # dev's; Klein's is narrower
    latent_channels=128,
    latent_downscale=16,
    patch_size=1,
    placements=("offset", "index", "uxo", "index_timestep_zero"),
    takes_guidance=True,
)
