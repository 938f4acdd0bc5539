"""FLUX.1: dev, schnell, Kontext, and with UNO's or USO's LoRA."""

from .base import Backbone, DiTSizes, MLLMSizes, Release, Training


def measure(module) -> DiTSizes:
    """The sizes of a loaded FLUX."""
    width = module.hidden_size
    return DiTSizes(
        width,
        mlp=int(width * module.params.mlp_ratio),
        keys=width,
        blocks=len(module.double_blocks),
        parameters=sum(p.numel() for p in module.parameters()),
        single=len(module.single_blocks),
        head=width // module.num_heads,
        fused_qkv=True,
    )


BACKBONE = Backbone(
    name="flux",
    title="FLUX.1",
    config={"image_model": "flux"},
    host_class="Flux",
    keys=("txt_in.weight", "img_in.weight", "double_blocks.0.img_attn.qkv.weight"),
    # FLUX.2, Chroma
    absent_keys=("double_stream_modulation_img.lin.weight", "distilled_guidance_layer.in_proj.weight"),
    context_width=4096,
    placements=("offset", "index", "uxo", "index_timestep_zero"),
    default_placement="uxo",  # the paper's
    releases=(  # for one reference, offset and index are the same
        Release("UNO, USO", r"\bu[ns]o\b", ("uxo",)),
        Release("Kontext", "kontext", ("offset", "index")),
    ),
    takes_guidance=True,
    training=Training(
        release="FLUX.1-dev",
        sizes=DiTSizes(3072, 12288, 3072, blocks=19, parameters=11_901_408_320, single=38, fused_qkv=True),
        measure=measure,
        mllm=MLLMSizes("InternVL3-8B", 28, 3584, 7_400_000_000),
        blocks=("double_blocks", "single_blocks"),
        # single blocks fuse attention's maps with the MLP's (linear1, linear2)
        lora_targets=r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]",
    ),
)
