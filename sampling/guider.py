"""The staged guider: a CFGGuider that gives each model call the tokens that its stage asks for.

For every combination of groups that the schedule needs, the conditions are registered with the host under a name of
their own; at each call the guider chooses by sigma and lets the host's own `sampling_function` do the rest. So strength
1/1 is the host's path, and strength 0 is the host's path without those tokens.
"""

import logging
from math import prod
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ..loaders.backbones import backbone_of, titles
from ..loaders.dit import context_width
from ..loaders.reference_latents import strengths_and_masks
from .attention import KeyStrengthAttention
from .stages import Stages
from .tokens import KeyStrengths, grid, key_strengths, reference_log_strength

REFERENCE_KEYS = (
    "reference_latents",
    "reference_latents_method",
    "subject_reference_strengths",
    "subject_reference_masks",
)

log = logging.getLogger(__name__)


class StagedGuider(comfy.samplers.CFGGuider):
    """CFG guider whose MLLM and VAE tokens follow a `Stages` schedule; for SamplerCustomAdvanced and any sampler.

    Raises ValueError for conditions that the model cannot take, before anything is loaded onto the device.
    """

    def __init__(self, model, stages: Stages):
        super().__init__(model)
        self.stages = stages
        self.backbone = backbone_of(model)
        self.variants = stages.variants()

    def set_conds(self, positive, negative=None) -> None:
        """Registers the conditions of every stage; `negative` may be left out when CFG is 1."""
        self._check(positive, "positive")
        conds = {}
        for index, (mllm, vae) in enumerate(self.variants):
            conds[_name("positive", index)] = self._stage_condition(positive, "positive", mllm, vae)
            if negative is not None:
                conds[_name("negative", index)] = self._stage_condition(negative, "negative", mllm, vae)
        if negative is not None:
            self._check(negative, "negative")
        self.inner_set_conds(conds)

    def set_cfg(self, cfg: float) -> None:
        super().set_cfg(cfg)
        if cfg != 1.0 and _name("negative", 0) not in self.original_conds:
            raise ValueError(
                f"CFG is {cfg:g}, which compares with a negative condition, but none is connected. "
                "Connect one (an empty prompt will do), or set CFG to 1."
            )

    # conditions ---------------------------------------------------------------------------------------------------

    def _check(self, condition, which: str) -> None:
        wanted = context_width(self.model_patcher)
        for tokens, values in condition:
            references = values.get("reference_latents") or []
            if wanted is not None and tokens is not None and tokens.shape[-1] != wanted:
                raise ValueError(
                    f"The {which} condition has tokens of width {tokens.shape[-1]}, but this diffusion model "
                    f"({self.backbone.name if self.backbone else type(self.model_patcher.model).__name__}) reads width {wanted}. Use the text "
                    f"encoder that belongs to the model, or a DLA trained with context width {wanted}."
                )
            if not references and which == "positive" and any(vae and not mllm for mllm, vae in self.variants):
                raise ValueError(
                    "The stage schedule has a stage of VAE tokens alone, but the positive condition holds no reference "
                    "latent: nothing would guide that stage. Add Identity puts one in; or choose the preset mllm_only."
                )
            most = self.backbone.most_references if self.backbone else None
            if most is not None and len(references) > most:
                raise ValueError(
                    f"{self.backbone.title} takes at most {most} reference latents, the {which} condition has "
                    f"{len(references)}."
                )
            strengths, masks = strengths_and_masks(values, len(references))
            if not self.backbone and (any(s not in (0, 1) for s in strengths) or any(m is not None for m in masks)):
                raise ValueError(self._only_on_and_off("reference strengths between 0 and 1, and masks"))
        if not self.backbone and any(
            s not in (0, 1) for key in self.stages.keyframes for s in (key.context, key.reference)
        ):
            raise ValueError(self._only_on_and_off("stage strengths other than 0 and 1"))

    def _only_on_and_off(self, what: str) -> str:
        name = type(self.model_patcher.model.diffusion_model).__name__
        return (
            f"{what[0].upper()}{what[1:]} need a model whose token layout this pack knows ({titles()} as ComfyUI "
            f"runs them); this one is {name}. Use 0 or 1."
        )

    def _stage_condition(self, condition, which: str, mllm: bool, vae: bool) -> list:
        """The host's CONDITIONING with the groups of one stage: references that are off are left out altogether; a
        context that is off keeps one token, whose keys the attention override takes out (hosts fail on none)."""
        out = []
        for tokens, values in condition:
            values = {**values, "prompt_type": values.get("prompt_type", which)}
            references = values.get("reference_latents") or []
            strengths, masks = strengths_and_masks(values, len(references))
            kept = [i for i, s in enumerate(strengths) if vae and s > 0]
            if kept:
                values["reference_latents"] = [references[i] for i in kept]
                values["subject_reference_strengths"] = [strengths[i] for i in kept]
                values["subject_reference_masks"] = [masks[i] for i in kept]
            else:
                for key in REFERENCE_KEYS:
                    values.pop(key, None)
            if not mllm and tokens is not None:
                tokens = tokens[:, :1]
                if values.get("attention_mask") is not None:
                    values["attention_mask"] = torch.ones_like(values["attention_mask"][:, :1])
                if not self.backbone:
                    tokens = torch.zeros_like(tokens)
            out.append([tokens, values])
        return out

    # sampling -----------------------------------------------------------------------------------------------------

    def sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        function = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removesuffix("_function")
        model_sampling = self.model_patcher.get_model_object("model_sampling")
        is_flow = isinstance(model_sampling, comfy.model_sampling.CONST)
        self.stages.clock.check_run(function, type(model_sampling).__name__, is_flow)
        if not self.backbone and any(not mllm for mllm, _ in self.variants):
            log.warning("This model's token layout is unknown: MLLM strength 0 gives one zero token instead of none.")
        self._stage: int | None = None
        self._overrides: dict[tuple, KeyStrengthAttention] = {}
        self._sigmas = [float(s) for s in sigmas]
        return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None):
        patch = getattr(self.inner_model.diffusion_model, "patch_size", 2)
        tokens = prod(grid(x.shape, patch if isinstance(patch, int) else 2))
        mllm, vae = self.stages.at_sigma(float(timestep.flatten()[0]), self._sigmas, tokens)
        index = self.variants.index((mllm > 0, vae > 0))
        if index != self._stage:
            self._stage = index
            _reset_step_cache(model_options)
        positive = self.conds[_name("positive", index)]
        negative = self.conds.get(_name("negative", index))
        override = self._override([positive, negative], mllm, vae, x, patch, model_options) if self.backbone else None
        if override is not None:
            options = {**model_options.get("transformer_options", {}), "optimized_attention_override": override}
            model_options = {**model_options, "transformer_options": options}
        out = comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, self.cfg, model_options=model_options, seed=seed
        )
        if override is not None and not override.applied and not _skipped_by_cache(model_options):
            raise RuntimeError(
                "Token strengths were asked for, but the model's attention never passed through ComfyUI's "
                f"optimized_attention_override ({type(self.inner_model.diffusion_model).__name__}). Another extension "
                "replaces the attention; remove it, or use strengths that leave both groups at 1."
            )
        return out

    def _override(self, conditions, mllm: float, vae: float, x: Tensor, patch: int, model_options: dict):
        """The attention override of this call, or None where every key keeps its weight (the host's untouched path)."""
        place = (mllm, vae, x.shape)
        if place not in self._overrides:
            strengths = {
                cond["uuid"]: self._key_strengths(cond, mllm, vae, x, patch)
                for conds in conditions
                for cond in conds or ()
            }
            if all(s.changes_nothing for s in strengths.values()):
                strengths = {}
            previous = model_options.get("transformer_options", {}).get("optimized_attention_override")
            self._overrides[place] = KeyStrengthAttention(strengths, previous)
        override = self._overrides[place]
        return override if override.strengths else None

    def _key_strengths(self, cond: dict[str, Any], mllm: float, vae: float, x: Tensor, patch: int) -> KeyStrengths:
        """From a condition as the host prepared it, so that padding and cropping are already in."""
        inputs = cond["model_conds"]
        context = inputs["c_crossattn"].cond.shape[1] if "c_crossattn" in inputs else 0
        latents = inputs["ref_latents"].cond if "ref_latents" in inputs else []
        strengths, masks = strengths_and_masks(cond, len(latents))
        references = [
            reference_log_strength(latent.shape, patch, vae * strength, mask)
            for latent, strength, mask in zip(latents, strengths, masks)
        ]
        return key_strengths(self.backbone.token_order, context, mllm, _covered(cond, x.shape), patch, references)


def _name(which: str, variant: int) -> str:
    """Condition names: the first variant bears the host's own, which its control and area code looks for."""
    return which if variant == 0 else f"{which} stage {variant}"


def _covered(cond: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part of the noisy latent that the condition covers (its `area`: sizes, then offsets, in latent pixels)."""
    if "area" not in cond:
        return tuple(shape)
    area = list(cond["area"])
    dims = len(area) // 2
    sizes = [min(area[i], shape[i - dims] - area[dims + i]) for i in range(dims)]
    return (*shape[: len(shape) - 2], *sizes[-2:])


def _reset_step_cache(model_options: dict) -> None:
    """EasyCache and LazyCache compare with the condition they saw first; a new stage is a new condition."""
    holder = model_options.get("transformer_options", {}).get("easycache")
    if holder is not None and hasattr(holder, "reset"):
        holder.reset()


def _skipped_by_cache(model_options: dict) -> bool:
    return "easycache" in model_options.get("transformer_options", {})
