"""The one writer and reader of CONDITIONING: a list of [context tokens (b, n, c), values], values by the keys below.

A condition is an entry as the host's guiders keep it: one dict, with the context tokens at `cross_attn`.

Beside the host's keys it may hold two of ours, lists aligned with `reference_latents`; other samplers ignore them.
The attention mask is written where it masks something, or where the DiT counts its context tokens by it: other
families are faster without, and FLUX.1 on the oldest hosts fails with one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dla.context import aggregate
from ..dla.features import Features
from .backbones import BACKBONES, Backbone

LATENTS, METHOD, POOLED, MASK = "reference_latents", "reference_latents_method", "pooled_output", "attention_mask"
STRENGTHS, MASKS = "subject_reference_strengths", "subject_reference_masks"  # ours
Condition = dict[str, Any]


def aggregate_conditioning(
    features: Features, dla=None, *, template: str = "auto", vit_blend: float = 0.0, pooled_from: list | None = None
) -> list:
    """CONDITIONING with the context tokens of one prompt's `features`: a DLA's, or the MLLM's last layer as it is.

    template, vit_blend: see dla.context.aggregate. pooled_from: a CONDITIONING whose pooled vector is taken over
    (FLUX.1: CLIP-L's). Raises ValueError where features, DLA or pooled_from do not fit.
    """
    context = (aggregate if dla is None else dla.aggregate)(features, template=template, vit_blend=vit_blend)
    pooled = pooled_from[0][1].get(POOLED) if pooled_from else None
    if pooled_from and pooled is None:
        raise ValueError(
            "The conditioning at pooled_from has no pooled vector. Connect a text encoder that makes"
            " one (FLUX.1: CLIP-L, e.g. from DualCLIPLoader with type flux), or leave pooled_from open."
        )
    reader = BACKBONES.get(dla.config.dit) if dla is not None else None
    # DiT not known: only OmniGen2's text encoder keeps its template, and OmniGen2 counts its context by the mask
    counts = reader.counts_context if reader else not features.info.drop_leading_template
    return [[context.tokens, values_of(context.attention_mask, counts, pooled=pooled)]]


def values_of(
    attention_mask: Tensor,
    counts_context: bool,
    *,
    pooled: Tensor | None = None,
    references: Sequence[Tensor] = (),
    method: str | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """The values of one entry, as the host's nodes write them.

    Args:
        attention_mask: (b, n) bool, True = a token of the prompt.
        counts_context: See `Backbone.counts_context`.
        pooled: (b, p), FLUX.1's CLIP-L; None = zeros.
        references: VAE latents (b, c, h, w) or (b, c, 1, h, w), as the VAE gives them.
        method: Their placement; None = the model's own.
        guidance: Distilled guidance; None = the host's default.
    """
    values: dict[str, Any] = {POOLED: pooled}
    if counts_context or not bool(attention_mask.all()):
        values[MASK] = attention_mask.long()
    if len(references):
        values[LATENTS] = list(references)
        if method is not None:
            values[METHOD] = method
    if guidance is not None:
        values["guidance"] = guidance
    return values


def reference_latents(values: Mapping[str, Any]) -> list[Tensor]:
    """Reference latents of an entry, also those that other nodes appended."""
    return list(values.get(LATENTS) or [])


def strengths_and_masks(values: Mapping[str, Any], count: int) -> tuple[list[float], list[Tensor | None]]:
    """Strength and mask of each of an entry's `count` reference latents; 1.0 and None for other nodes'."""
    strengths, masks = list(values.get(STRENGTHS) or []), list(values.get(MASKS) or [])
    return (strengths + [1.0] * count)[:count], (masks + [None] * count)[:count]


def add_references(
    conditioning: list, latents: list[Tensor], strength: float, masks: list[Tensor | None], method: str | None
) -> list:
    """A copy of CONDITIONING with more reference latents, as the VAE gives them, behind those that it has.

    The strength of each is multiplied into the schedule's; masks are (h, w) in 0..1 over the picture of each, or None;
    the method is the placement of all of an entry's references, None = as it was.
    """
    out = []
    for tokens, values in conditioning:
        before = reference_latents(values)
        strengths, earlier = strengths_and_masks(values, len(before))
        more = {LATENTS: before + latents, STRENGTHS: strengths + [strength] * len(latents), MASKS: earlier + masks}
        out.append([tokens, {**values, **more, **({METHOD: method} if method is not None else {})}])
    return out


def stage_variant(condition: Condition, context: bool, reference: bool, backbone: Backbone | None) -> Condition:
    """A condition with the token groups of one stage.

    References that are off are left out altogether. A context that is off keeps a token, since hosts fail on none: the
    attention override takes its keys out, or, where the model's token layout is not known (no `backbone`), it is zero.
    References of strength 0 are never on.
    """
    condition = dict(condition)
    latents = reference_latents(condition)
    strengths, masks = strengths_and_masks(condition, len(latents))
    on = [index for index, strength in enumerate(strengths) if reference and strength > 0]
    for key, column in ((LATENTS, latents), (STRENGTHS, strengths), (MASKS, masks)):
        condition[key] = [column[index] for index in on]
    if not on:
        for key in (LATENTS, METHOD, STRENGTHS, MASKS):
            condition.pop(key, None)
    if not context and condition.get("cross_attn") is not None:
        tokens = condition["cross_attn"][:, : backbone.context_off_tokens if backbone else 1]
        condition["cross_attn"] = tokens if backbone else torch.zeros_like(tokens)
        if condition.get(MASK) is not None:
            condition[MASK] = torch.ones_like(condition[MASK][:, : tokens.shape[1]])
    return condition
