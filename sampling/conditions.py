"""What is checked of the conditions before a staged run."""

from collections.abc import Iterable

from ..loaders.backbones import backbone_of, titles
from ..loaders.conditioning import Condition, reference_latents, reference_settings
from ..loaders.dit import context_width, dit_of
from ..loaders.protocols import Model
from .stages import Stages


def check_conditions(model: Model, stages: Stages, conditions: Iterable[Condition], name: str) -> None:
    """Raises ValueError for conditions that the model cannot take under this schedule.

    Args:
        model: The host's MODEL.
        stages: The schedule.
        conditions: Conditions that a guider knows by one name.
        name: That name; "positive" must guide every stage.
    """
    if name == "empty_negative_prompt" and any(not context for context, _ in stages.variants()):
        raise ValueError(
            "The Perp-Neg guider divides by the difference between the positive and the empty prompt, but the stage "
            "schedule has a stage without MLLM tokens, where both are the same. Choose the preset semantics_first, or "
            "another guider."
        )
    backbone, wanted = backbone_of(model), context_width(model)
    most = backbone.most_references if backbone else None
    for condition in conditions:
        tokens, references = condition.get("cross_attn"), reference_latents(condition)
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
        for settings in reference_settings(condition, len(references)):
            if not backbone and settings not in ((0, None, None), (1, None, None)):
                raise ValueError(_only_on_and_off(model, "Reference strengths between 0 and 1, masks and regions"))
    if not backbone and any(s not in (0, 1) for key in stages.keyframes for s in (key.context, key.reference)):
        raise ValueError(_only_on_and_off(model, "Stage strengths other than 0 and 1"))


def _only_on_and_off(model: Model, what: str) -> str:
    return (
        f"{what} need a model whose token layout this pack knows ({titles()} as ComfyUI runs them)"
        f"; this one is {type(dit_of(model.model)).__name__}. Use 0 or 1."
    )
