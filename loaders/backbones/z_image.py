"""Z-Image, also Omni: Lumina's single-stream blocks behind Qwen3-4B, with every caption and picture padded.

A reference brings a caption of its own, which may be empty, and in Omni tokens of SigLIP. The blocks that refine the
noisy image read the references' latents, too. The host's source: `comfy/ldm/lumina/model.py`, read at 0.33.0.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from .base import Backbone, Grid, Part


def token_parts(
    module: Any, context: int, image: Grid, references: list[Grid], shapes: Mapping[str, Any]
) -> list[Part]:
    """Captions of the references, the context and further captions; SigLIP's tokens; the references; the image."""
    multiple = module.pad_tokens_multiple or 1

    def padded(tokens: int) -> int:
        return -(-tokens // multiple) * multiple

    captions = [shape[0] for shape in shapes.get("ref_contexts", ())] if references else []
    empty = multiple * max(len(references) - len(captions), 0)
    parts = [Part("context", padded(context) + sum(map(padded, captions)) + empty, joint_only=True)]
    if references and module.siglip_embedder is not None:
        seen = [(1, *shape[:2]) for shape in shapes.get("siglip_feats", ())][: len(references)]
        parts += [Part("reference", padded(prod(size)), size, i, joint_only=True) for i, size in enumerate(seen)]
        # one for each reference without features, and the image's
        parts.append(Part("other", multiple * (len(references) - len(seen) + 1), joint_only=True))
    parts += [Part("reference", padded(prod(size)), size, i) for i, size in enumerate(references)]
    return [*parts, Part("image", prod(image), image), Part("other", padded(prod(image)) - prod(image))]


BACKBONE = Backbone(
    name="z_image",
    title="Z-Image",
    config={"image_model": "lumina2", "z_image_modulation": True},
    host_class="Lumina2",
    keys=("cap_embedder.1.weight", "cap_pad_token", "noise_refiner.0.attention.k_norm.weight"),
    absent_keys=("dec_net.cond_embed.weight",),  # in pixel space
    context_layer="cap_embedder.1",
    context_width=2560,
    token_order=("context", "reference", "image"),
    token_parts=token_parts,
    joint_blocks=("layers",),
    contextless_blocks=("noise_refiner",),
)
