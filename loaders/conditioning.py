"""MLLM features to the host's CONDITIONING."""

from __future__ import annotations

from ..dla.context import aggregate
from ..dla.features import Features


def aggregate_conditioning(
    features: Features, dla=None, *, template: str = "auto", vit_blend: float = 0.0, pooled_from: list | None = None
) -> list:
    """CONDITIONING with the context tokens of `features`: a DLA's (loaders.dla.DLA), or the MLLM's last layer as it is.

    template, vit_blend: see dla.aggregate; vit_blend 0 = the DLA's own setting. pooled_from: a CONDITIONING whose
    pooled vector is taken over (FLUX.1: CLIP-L's). Raises ValueError where features, DLA or pooled_from do not fit.
    """
    run = aggregate if dla is None else dla.aggregate
    context = run(features, template=template, vit_blend=vit_blend)
    values = {"pooled_output": _pooled(pooled_from)}
    reader = dla.config.dit if dla is not None else ""
    # OmniGen2 learns its number of context tokens from the mask; the others are faster without one that masks nothing
    if not bool(context.attention_mask.all()) or reader == "omnigen2" or not features.info.drop_leading_template:
        values["attention_mask"] = context.attention_mask.long()
    return [[context.tokens, values]]


def _pooled(conditioning: list | None):
    if not conditioning:
        return None
    pooled = conditioning[0][1].get("pooled_output")
    if pooled is None:
        raise ValueError(
            "Aggregate Layers: the conditioning at pooled_from has no pooled vector. Connect a text encoder that makes"
            " one (FLUX.1: CLIP-L, e.g. from DualCLIPLoader with type flux), or leave pooled_from open."
        )
    return pooled
