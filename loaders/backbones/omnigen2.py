"""OmniGen2."""

from .base import Backbone, DiTSizes, MLLMSizes, Training


def measure(module) -> DiTSizes:
    """The sizes of a loaded OmniGen2."""
    first = module.layers[0]
    return DiTSizes(
        module.hidden_size,
        mlp=first.feed_forward.linear_1.out_features,
        keys=first.attn.to_k.out_features,
        blocks=len(module.layers),
        parameters=sum(p.numel() for p in module.parameters()),
        refiners=len(module.noise_refiner),
        head=first.attn.dim_head,
        streams=1,
        norms=4,
    )


BACKBONE = Backbone(
    name="omnigen2",
    title="OmniGen2",
    config={"image_model": "omnigen2"},
    host_class="Omnigen2",
    keys=("time_caption_embed.timestep_embedder.linear_1.bias",),
    context_layer="time_caption_embed.caption_embedder.1",
    context_width=2048,
    token_order=("context", "reference", "image"),
    joint_blocks=("layers",),
    most_references=5,
    counts_context=True,
    training=Training(
        release="OmniGen2",
        sizes=DiTSizes(2520, 10240, 840, blocks=32, parameters=3_967_161_400, refiners=2, head=120, streams=1, norms=4),
        measure=measure,
        mllm=MLLMSizes("Qwen2.5-VL-3B", 36, 2048, 3_750_000_000),
        blocks=("context_refiner", "noise_refiner", "ref_image_refiner", "layers"),
        lora_targets=r"(layers|noise_refiner|ref_image_refiner|context_refiner)\.\d+\.attn\.(to_[qkv]|to_out\.0)",
    ),
)
