"""Ming-Image: Z-Image's blocks behind Ling-mini, with the references as frames behind the noisy ones.

The context has two parts: `cross_attn`, 256 tokens that the encoder's query tokens became, and `direct_context`, tokens
of prompt and images that are already as wide as the DiT. The blocks that refine the noisy image read the references,
too. A context moves the image's positions by a whole number of 32 tokens.

Source: the host's ldm/lumina, model_base, text_encoders/ming_image and nodes_ming, of 0.37.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from .base import Backbone, Grid, Part


def token_parts(
    module: Any, context: int, image: Grid, references: list[Grid], shapes: Mapping[str, Any]
) -> list[Part]:
    """Both parts of the context, the image and the references, padded where the model has tokens for it (Layer)."""
    multiple = module.pad_tokens_multiple or 1
    context += shapes.get("direct_context", (0,))[0]
    parts = [Part("context", context + -context % multiple, joint_only=True), Part("image", prod(image), image)]
    parts += [Part("reference", prod(size), size, index) for index, size in enumerate(references)]
    padding = -sum(part.tokens for part in parts[1:]) % multiple
    return [*parts, Part("other", padding)] if padding else parts


BACKBONE = Backbone(
    name="ming_image",
    title="Ming-Image",
    config={"image_model": "ming_image"},
    host_class="MingImage",
    keys=("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
    absent_keys=("cap_pad_token", "dec_net.cond_embed.weight"),  # Z-Image, in pixel space
    rows={"cap_embedder.1.weight": 3840},  # less in Lumina 2
    context_layer="cap_embedder.1",
    context_width=2560,
    token_parts=token_parts,
    joint_blocks=("layers",),
    contextless_blocks=("noise_refiner",),
    latent_dimensions=3,
    frames_apart=True,
)
