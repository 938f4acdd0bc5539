"""What is checked of the conditions before a staged run."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..loaders.backbones import Backbone, backbone_of, titles, unread_family
from ..loaders.conditioning import METHOD, Condition, ReferenceSettings, reference_latents, reference_settings
from ..loaders.dit import context_width, dit_of, pooled_width
from ..loaders.protocols import Model
from .reference_stages import RunSchedule
from .stages import Stages

STAGES_REFUSED = (
    "Stages and Image Guidance: {family} ({model}) is refused. ComfyUI's source of it could not be read when this pack "
    "was written, so it is not known which of the attention's tokens are its text and its references, nor what it makes"
    " of none; a guess would give wrong pictures without an error. Remove this pack's node and use the model as its"
    " template in ComfyUI does; or choose the preset both and references without settings of their own, which changes"
    " nothing; or another model (docs/backbones.md), as FLUX.2 Klein."
)

# values of a condition by which models of families that are not known here read its prompt beside the context
OTHER_TEXT = ("conditioning_llama3", "conditioning_mt5xl", "conditioning_byt5small", "text_input_ids", "t5xxl_ids")


def check_family(model: Model, changes: bool) -> None:
    """Raises ValueError for a model of a family that could not be read, where something is to be changed in its run."""
    family = unread_family(model)
    if family and changes:
        raise ValueError(STAGES_REFUSED.format(family=family, model=type(dit_of(model.model)).__name__))


def changes_strengths(stages: Stages) -> bool:
    """Whether a schedule has other strengths than 1 and 1."""
    return any((key.context, key.reference) != (1, 1) for key in stages.keyframes)


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
    check_family(model, changes_strengths(stages))
    backbone, wanted, pooled_wanted = backbone_of(model), context_width(model), pooled_width(model)
    most = backbone.most_references if backbone else None
    for condition in conditions:
        tokens, references = condition.get("cross_attn"), reference_latents(condition)
        if wanted is not None and tokens is not None and tokens.shape[-1] != wanted:
            raise ValueError(
                f"The {name} condition has tokens of width {tokens.shape[-1]}, but this diffusion model "
                f"({backbone.title if backbone else type(model.model).__name__}) reads width {wanted}. Use the text "
                f"encoder that belongs to the model, or a DLA trained with context width {wanted}."
            )
        pooled = condition.get("pooled_output")
        if pooled_wanted is not None and pooled is not None and pooled.shape[-1] != pooled_wanted:
            raise ValueError(
                f"The {name} condition has a pooled vector of width {pooled.shape[-1]}, but this diffusion model reads "
                f"width {pooled_wanted}. Use the text encoder that belongs to the model (FLUX.1: CLIP-L)."
            )
        if backbone:
            for latent in references:
                _check_reference(latent, backbone, name)
        others = [key for key in OTHER_TEXT if condition.get(key) is not None]
        if others and not backbone and any(not context for context, _ in stages.variants()):
            raise ValueError(
                "The stage schedule has a stage without MLLM tokens, but this diffusion model "
                f"({type(model.model).__name__}) reads the prompt of the {name} condition also from "
                f"{', '.join(others)}, which this pack cannot leave out: the stage would still follow the prompt. "
                "Choose the preset semantics_first or both."
            )
        if not references and name == "positive" and (False, True) in stages.variants():
            raise ValueError(
                "The stage schedule has a stage of VAE tokens alone, but the positive condition holds no reference "
                "latent: nothing would guide that stage. Add one with ReferenceLatent or Add Identity, or choose the "
                "preset semantics_first or mllm_only."
            )
        if backbone and most is not None and len(references) > most:
            raise ValueError(
                f"{backbone.title} takes at most {most} reference latents, but the {name} condition has "
                f"{len(references)}. Remove {len(references) - most} of them."
            )
        if (
            backbone
            and backbone.needs_placement
            and references
            and any(reference for _, reference in stages.variants())
            and not condition.get(METHOD)
            and model.get_model_object("diffusion_model.default_ref_method") is None
        ):
            raise ValueError(
                f"{backbone.title} reads reference latents only where a condition says how to place them, and the "
                f"{name} condition does not: they would have no effect. Add FluxKontextMultiReferenceLatentMethod with "
                f"{backbone.default_placement} behind the nodes that add them, or add them with Add Identity."
            )
        for settings in reference_settings(condition, len(references)):
            check_family(model, settings != ReferenceSettings())
            if not backbone and settings not in (ReferenceSettings(0.0), ReferenceSettings(1.0)):
                what = "Strengths between 0 and 1, masks, regions and schedules of single references"
                raise ValueError(_only_on_and_off(model, what))
    if not backbone and any(s not in (0, 1) for key in stages.keyframes for s in (key.context, key.reference)):
        raise ValueError(_only_on_and_off(model, "Stage strengths other than 0 and 1"))


def check_latent(model: Model, shape: Sequence[int]) -> None:
    """Raises ValueError for a latent whose shape (b, c, ...) has other channels than the model samples."""
    backbone = backbone_of(model)
    if backbone and shape[1] != backbone.latent_channels:
        raise ValueError(
            f"The latent to be sampled has {shape[1]} channels, but {backbone.title} samples "
            f"{backbone.latent_channels}. Make it with the VAE or the empty latent that belongs to the model."
        )


def _check_reference(latent: Tensor, backbone: Backbone, name: str) -> None:
    """Raises ValueError for a reference latent that the family cannot read."""
    if latent.shape[1] != backbone.latent_channels:
        raise ValueError(
            f"The {name} condition has a reference latent of shape {tuple(latent.shape)}, but {backbone.title} reads "
            f"(batch, {backbone.latent_channels}, height, width). Encode the picture with the VAE of the model."
        )
    if not bool(latent.isfinite().all()):
        raise ValueError(
            f"The {name} condition has a reference latent with values that are NaN or infinite. The VAE that made it "
            "has failed (often in fp16: load it in fp32 or bf16)."
        )


def check_guidance(
    schedule: RunSchedule, positive: Iterable[Condition], sigmas: Sequence[float], whole: Sequence[float], tokens: int
) -> None:
    """Raises ValueError where the schedules of the references switch all off in a stage of VAE tokens alone.

    Args:
        schedule: The run's.
        positive: The conditions that must guide every stage.
        sigmas: n + 1 falling values for n steps of the run.
        whole: Those of the schedule that the run is a part of.
        tokens: Noisy image tokens.
    """
    found = [reference_settings(condition, len(reference_latents(condition))) for condition in positive]
    for sigma in sigmas[:-1]:
        moment = schedule.at(sigma, whole, tokens)
        if moment.context == 0 < moment.reference and not all(any(map(moment.strength, some)) for some in found):
            raise ValueError(
                f"At sigma {sigma:.4g} the stage schedule reads VAE tokens alone, but every reference of the positive "
                "condition is off there by its own schedule (input stages of Add Identity): nothing would guide that "
                "step. Turn one of them on there, or choose the preset semantics_first for the run."
            )


def _only_on_and_off(model: Model, what: str) -> str:
    return (
        f"{what} need a model whose token layout this pack knows ({titles()} as ComfyUI runs them)"
        f"; this one is {type(dit_of(model.model)).__name__}. Use 0 or 1."
    )
