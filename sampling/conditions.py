"""The conditions of a staged run: what is checked before it, and each stage's variant of a condition.

A condition is a dict as the host's guiders keep it: `cross_attn` holds the context tokens (b, n, c), the rest are the
values of a CONDITIONING.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..loaders.backbones import Backbone, backbone_of, titles
from ..loaders.dit import context_width
from ..loaders.protocols import Model
from ..loaders.reference_latents import strengths_and_masks
from .stages import Stages

Condition = dict[str, Any]
REFERENCE_KEYS = (
    "reference_latents",
    "reference_latents_method",
    "subject_reference_strengths",
    "subject_reference_masks",
)


def check_conditions(model: Model, stages: Stages, conditions: Iterable[Condition], name: str) -> None:
    """Raises ValueError for conditions that the model cannot take under this schedule.

    Args:
        model: The host's MODEL.
        stages: The schedule.
        conditions: Conditions that a guider knows by one name.
        name: That name; "positive" must guide every stage.
    """
    backbone, wanted = backbone_of(model), context_width(model)
    most = backbone.most_references if backbone else None
    for condition in conditions:
        tokens, references = condition.get("cross_attn"), condition.get("reference_latents") or []
        if wanted is not None and tokens is not None and tokens.shape[-1] != wanted:
            raise ValueError(
                f"The {name} condition has tokens of width {tokens.shape[-1]}, but this diffusion model "
                f"({backbone.title if backbone else type(model.model).__name__}) reads width {wanted}. Use the text "
                f"encoder that belongs to the model, or a DLA trained with context width {wanted}."
            )
        if not references and name == "positive" and (False, True) in stages.variants():
            raise ValueError(
                "The stage schedule has a stage of VAE tokens alone, but the positive condition holds no reference "
                "latent: nothing would guide that stage. Add Identity puts one in; or choose the preset mllm_only."
            )
        if backbone and most is not None and len(references) > most:
            raise ValueError(
                f"{backbone.title} takes at most {most} reference latents, the {name} condition has {len(references)}."
            )
        strengths, masks = strengths_and_masks(condition, len(references))
        if not backbone and (any(s not in (0, 1) for s in strengths) or any(m is not None for m in masks)):
            raise ValueError(_only_on_and_off(model, "Reference strengths between 0 and 1, and masks,"))
    if not backbone and any(s not in (0, 1) for key in stages.keyframes for s in (key.context, key.reference)):
        raise ValueError(_only_on_and_off(model, "Stage strengths other than 0 and 1"))


def _only_on_and_off(model: Model, what: str) -> str:
    return (
        f"{what} need a model whose token layout this pack knows ({titles()} as ComfyUI runs them)"
        f"; this one is {type(model.model.diffusion_model).__name__}. Use 0 or 1."
    )


def stage_variant(condition: Condition, context: bool, reference: bool, backbone: Backbone | None) -> Condition:
    """A condition with the token groups of one stage.

    References that are off are left out altogether. A context that is off keeps a token, since hosts fail on none: the
    attention override takes its keys out, or, where the model's token layout is not known, it is zero.

    Args:
        condition: With both groups.
        context: Whether the context is on.
        reference: Whether the references are on; those of strength 0 never are.
        backbone: The record of the DiT's family; None where its token layout is not known.
    """
    condition = dict(condition)
    references = condition.get("reference_latents") or []
    strengths, masks = strengths_and_masks(condition, len(references))
    on = [i for i, strength in enumerate(strengths) if reference and strength > 0]
    if on:
        condition["reference_latents"] = [references[i] for i in on]
        condition["subject_reference_strengths"] = [strengths[i] for i in on]
        condition["subject_reference_masks"] = [masks[i] for i in on]
    else:
        for key in REFERENCE_KEYS:
            condition.pop(key, None)
    if not context and condition.get("cross_attn") is not None:
        tokens = condition["cross_attn"][:, : backbone.context_off_tokens if backbone else 1]
        condition["cross_attn"] = tokens if backbone else torch.zeros_like(tokens)
        if condition.get("attention_mask") is not None:
            condition["attention_mask"] = torch.ones_like(condition["attention_mask"][:, : tokens.shape[1]])
    return condition
