"""The one writer and reader of CONDITIONING: a list of [context tokens (b, n, c), values], values by the keys below.

A condition is an entry as the host's guiders keep it: one dict, with the context tokens at `cross_attn`.

Beside the host's keys it may hold some of ours, lists aligned with `reference_latents`: see `ReferenceSettings`. Only a
staged run reads them, other samplers ignore them.
The attention mask is written where it masks something, or where the DiT counts its context tokens by it: other
families are faster without, and FLUX.1 on the oldest hosts fails with one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dla.context import aggregate
from ..dla.features import Features
from .backbones import BACKBONES, Backbone

LATENTS, METHOD, POOLED, MASK = "reference_latents", "reference_latents_method", "pooled_output", "attention_mask"
# Z-Image Omni's, one for each reference: SigLIP's features, and captions, which may be more
ALIGNED = VISION, CAPTIONS = "clip_vision_outputs", "reference_latents_text_embeds"
DIRECT = "direct_context"  # Ming-Image's tokens beside the context that are as wide as the DiT
CONTROL, CONTROL_TEXT = "control", "cross_attn_controlnet"  # a ControlNet, and what it reads in place of the context
SLOTS, WITH_IMAGES = "image_slots", "subject_context_with_images"
Condition = dict[str, Any]

NO_IMAGE_LEFT = (
    "Qwen-Image 2.1's text leaves out an image whose reference latent comes (image_slots), so that without VAE tokens "
    "nothing of it would be left. Put Encode Qwen-Image 2.1 for Stages in the place of TextEncodeQwenImage21: it also "
    "encodes with the images in the text. Or choose the preset both or vae_only, remove Image Guidance, or set the "
    "reference's strength above 0."
)


class ReferenceSettings(NamedTuple):
    """What a staged run does with one reference latent."""

    strength: float = 1.0  # multiplied into the schedule's
    mask: Tensor | None = None  # (h, w) in 0..1 over its picture, any size; 0 = the token is removed
    region: Tensor | None = None  # (h, w) in 0..1 over the canvas, any size; 0 = image tokens there do not read it
    stages: Any = None  # a schedule (sampling.stages.Stages), whose reference strength is multiplied into the run's


class ContextWithImages(NamedTuple):
    """A context that holds what the MLLM sees of the images, for stages without reference latents in their place."""

    tokens: Tensor  # (b, n, c)
    attention_mask: Tensor | None
    instead_of: Tensor  # (b, m, c), the context in which the reference latents take the images' places


AS_LATENTS = "latents (b, c, h, w) as a VAE gives them. Another node has written it: remove that node."
# keys of the lists
SETTINGS = tuple(f"subject_reference_{name}" for name in ("strengths", "masks", "regions", "stages"))


def aggregate_conditioning(
    features: Features, dla=None, *, template: str = "auto", vit_blend: float = 0.0, pooled_from: list | None = None
) -> list:
    """CONDITIONING with the context tokens of one prompt's `features`: a DLA's, or its own text encoder's.

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
    # DiT not known: as its text encoder; OmniGen2's keeps its template, and OmniGen2 counts its context by the mask
    always = features.stock is not None and features.stock.always_masked
    counts = reader.counts_context if reader else always or not features.info.drop_leading_template
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
    """Reference latents of an entry, also those that other nodes appended. Raises ValueError for what are none."""
    found = values.get(LATENTS)
    found = [] if found is None else found
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{LATENTS} of a conditioning is {type(found).__name__}, expected a list of {AS_LATENTS}")
    for latent in found:
        if not isinstance(latent, Tensor) or latent.ndim not in (4, 5) or not latent.is_floating_point():
            kind = (
                f"{latent.dtype} of shape {tuple(latent.shape)}"
                if isinstance(latent, Tensor)
                else type(latent).__name__
            )
            raise ValueError(f"{LATENTS} of a conditioning holds {kind}, expected {AS_LATENTS}")
    return list(found)


def reference_placement(values: Mapping[str, Any]) -> str | None:
    """Placement of an entry's reference latents, also one that another node set; None = the model's own."""
    return values.get(METHOD)


def reference_settings(values: Mapping[str, Any], count: int) -> list[ReferenceSettings]:
    """The settings of each of an entry's `count` reference latents; the defaults for those of other nodes."""
    lists = [list(values.get(key) or ()) for key in SETTINGS]
    columns = [(found + [default] * count)[:count] for found, default in zip(lists, ReferenceSettings())]
    return [ReferenceSettings(*row) for row in zip(*columns)]


def _without_places(condition: Condition, with_images: ContextWithImages | None) -> Condition:
    """The context and its mask for a condition whose references have places in the context, but are off."""
    if with_images is None:
        raise ValueError(NO_IMAGE_LEFT)
    if not torch.equal(with_images.instead_of, condition["cross_attn"]):
        raise ValueError(
            "The context of a condition was changed behind Encode Qwen-Image 2.1 for Stages, but not the one that it "
            "holds for stages without VAE tokens. Remove what changes it, or choose the preset both or vae_only."
        )
    return {"cross_attn": with_images.tokens, MASK: with_images.attention_mask}


def add_references(
    conditioning: list, latents: list[Tensor], settings: Sequence[ReferenceSettings], method: str | None
) -> list:
    """A copy of CONDITIONING with more reference latents, as the VAE gives them, behind those that it has.

    The method is the placement of all of an entry's references, None = as it was.
    """
    out = []
    for tokens, values in conditioning:
        before = reference_latents(values)
        found = [*zip(before, reference_settings(values, len(before))), *zip(latents, settings)]
        out.append([tokens, {**values, **_reference_values(found), **({METHOD: method} if method is not None else {})}])
    return out


def add_context_with_images(conditioning: list, with_images: list) -> list:
    """A copy of CONDITIONING whose references have places in the context, with one that has none beside it.

    Args:
        conditioning: Qwen-Image 2.1's, with reference latents and `image_slots`.
        with_images: The same prompt and images, encoded without a VAE.
    """
    return [
        [tokens, {**values, WITH_IMAGES: ContextWithImages(kept, others.get(MASK), tokens)}]
        for (tokens, values), (kept, others) in zip(conditioning, with_images, strict=True)
    ]


def with_settings_of(condition: Condition, other: Condition) -> Condition:
    """A condition with the settings of the references of another one."""
    kept = {key: value for key, value in condition.items() if key not in SETTINGS}
    return kept | {key: other[key] for key in SETTINGS if key in other}


def _reference_values(references: Sequence[tuple[Tensor, ReferenceSettings]]) -> dict[str, list]:
    """The aligned lists of an entry with one reference or more."""
    columns = zip(SETTINGS, zip(*(settings for _, settings in references)))
    return {LATENTS: [latent for latent, _ in references]} | {key: list(column) for key, column in columns}


def area_of(condition: Condition, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Height, width, top and left, in latent elements, of what a condition covers of a canvas (h, w)."""
    area = condition.get("area")
    if area is None:
        return (*canvas, 0, 0)
    sides = len(area) // 2  # 3 with frames
    top, left = area[-2:]
    return min(area[sides - 2], canvas[0] - top), min(area[sides - 1], canvas[1] - left), top, left


def stage_variant(
    condition: Condition, context: bool, reference: bool, backbone: Backbone | None, controlled: bool = False
) -> Condition:
    """A condition with the token groups of one stage.

    References that are off are left out altogether. A context that is off keeps a token, since hosts fail on none: the
    attention override takes its keys out, or, where the model's token layout is not known (no `backbone`), it is zero.
    References of strength 0 are never on. Where references have places in the context, the one for stages without them
    is that which holds the images. Raises ValueError where there is none.

    controlled: whether a ControlNet may read the condition. What it does with the token that a context that is off
    keeps does not pass through the override: it gets a zero one.
    """
    condition = dict(condition)
    latents = reference_latents(condition)
    found = [*zip(latents, reference_settings(condition, len(latents)))]
    off = {index for index, (_, settings) in enumerate(found) if not reference or settings.strength == 0}
    on = [one for index, one in enumerate(found) if index not in off]
    with_images = condition.pop(WITH_IMAGES, None)
    if latents and condition.get(SLOTS) and (backbone is None or backbone.references_in_context):
        if context and not on:
            condition |= _without_places(condition, with_images)
        condition[SLOTS] = [slot for index, slot in enumerate(condition[SLOTS]) if index not in off]
        if not (context and on):
            del condition[SLOTS]
    for key in () if on else (LATENTS, METHOD, *SETTINGS):
        condition.pop(key, None)
    condition |= _reference_values(on) if on else {}
    for key in ALIGNED if off else ():
        if condition.get(key) is not None:
            condition[key] = [value for index, value in enumerate(condition[key]) if index not in off]
    for key in () if context else (CAPTIONS, DIRECT):
        condition.pop(key, None)
    if not context and condition.get("cross_attn") is not None:
        tokens = condition["cross_attn"][:, : backbone.context_off_tokens if backbone else 1]
        condition["cross_attn"] = tokens if backbone else torch.zeros_like(tokens)
        if controlled or condition.get(CONTROL_TEXT) is not None:
            condition[CONTROL_TEXT] = torch.zeros_like(tokens)
        if condition.get(MASK) is not None:
            condition[MASK] = torch.ones_like(condition[MASK][:, : tokens.shape[1]])
    return condition
