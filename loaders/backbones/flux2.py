"""FLUX.2: dev and Klein."""

from dataclasses import replace

from .base import Backbone, DiTSizes, MLLMSizes, Training
from .flux import measure as measure_flux


def measure(module) -> DiTSizes:
    """The sizes of a loaded FLUX.2, whose MLPs are gated."""
    return replace(measure_flux(module), gated=True)


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
    pads_context=True,  # to 512 tokens; they are numbered, those of padding too
    takes_guidance=True,  # dev; Klein has no such layer, and the host passes it by
    training=Training(
        release="FLUX.2 Klein 4B",
        sizes=DiTSizes(3072, 9216, 3072, blocks=5, parameters=3_875_544_576, single=20, fused_qkv=True, gated=True),
        measure=measure,
        mllm=MLLMSizes("Qwen3-VL-4B", 36, 2560, 4_440_000_000),
        blocks=("double_blocks", "single_blocks"),
        lora_targets=r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]",
        context_width=7680,
    ),
)
