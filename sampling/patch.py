"""Stages on a MODEL: a patch that gives each model call the tokens of its stage, in any guider and with any sampler.

Where a run begins, every named condition gets a variant for each combination of groups that the schedule needs; at each
call the variant is chosen by sigma, and the guider's own prediction does the rest. So strength 1/1 is the host's path,
and strength 0 is the host's path without those tokens.
"""

import logging
from functools import partial
from math import prod
from typing import Any
from uuid import uuid4

import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
from torch import Tensor

from ..loaders.backbones import Backbone, backbone_of
from ..loaders.conditioning import Condition, stage_variant, strengths_and_masks
from .attention import KeyStrengthAttention
from .conditions import check_conditions
from .stages import Stages
from .tokens import KeyStrengths, grid, key_strengths, patch_size, reference_log_strength

KEY = "subject_stages"  # of the wrappers
OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
PREDICT_NOISE = comfy.patcher_extension.WrappersMP.PREDICT_NOISE

log = logging.getLogger(__name__)


def add_stages(model_options: dict, stages: Stages) -> None:
    """Puts a schedule into the options of a cloned MODEL or of a guider, in the place of an earlier one."""
    _wrappers(model_options, OUTER_SAMPLE)[KEY] = [partial(_outer_sample, stages)]


def is_staged(model_options: dict) -> bool:
    """Whether a staged run has begun, by the options of its guider."""
    return KEY in _wrappers(model_options, PREDICT_NOISE)


def _wrappers(model_options: dict, kind: str) -> dict[str, list]:
    """The host's wrappers of one kind, by key."""
    wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    return wrappers.setdefault(kind, {})


def _outer_sample(stages: Stages, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Wrapper of the guider's `outer_sample`: the run's state is in the options of this run alone."""
    guider, (_, _, sampler, sigmas, *_) = executor.class_obj, args
    for name, conditions in guider.conds.items():
        check_conditions(guider.model_patcher, stages, conditions, name)
    function = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removesuffix("_function")
    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    is_flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    stages.clock.check_run(function, type(model_sampling).__name__, is_flow)
    run = StagedRun(stages, backbone_of(guider.model_patcher), [float(s) for s in sigmas])
    run.add_variants(guider.conds)
    options = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    _wrappers(guider.model_options, PREDICT_NOISE)[KEY] = [run.predict_noise]
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = options


class StagedRun:
    """State of one run under a schedule: the variants of its conditions, which is on, the overrides made so far.

    Args:
        stages: The schedule.
        backbone: The record of the DiT's family; None where its token layout is not known.
        sigmas: The run's, n + 1 falling values for n steps.
    """

    def __init__(self, stages: Stages, backbone: Backbone | None, sigmas: list[float]):
        self.stages, self.backbone, self.sigmas = stages, backbone, sigmas
        self.variants = stages.variants()
        self.names: list[str] = []
        self._current: int | None = None
        self._overrides: dict[tuple, KeyStrengthAttention] = {}
        if backbone is None and any(not context for context, _ in self.variants):
            log.warning("This model's token layout is unknown: MLLM strength 0 gives one zero token instead of none.")

    def add_variants(self, conds: dict[str, list[Condition]]) -> None:
        """Replaces each named list of conditions by its first variant and adds the others, under names of their own.

        The first keeps the name since the host's control and area code looks for it.
        """
        original = dict(conds)
        self.names = list(original)
        for index, (context, reference) in enumerate(self.variants):
            for name, conditions in original.items():
                conds[_name(name, index)] = [
                    {
                        **stage_variant(condition, context, reference, self.backbone),
                        "uuid": uuid4() if index else condition["uuid"],
                        "prompt_type": condition.get("prompt_type", name),
                    }
                    for condition in conditions
                ]

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None
    ) -> Tensor:
        """Wrapper of the guider's `predict_noise`: with the conditions of the stage, and its attention override."""
        guider = executor.class_obj
        diffusion_model = guider.inner_model.diffusion_model
        patch = patch_size(diffusion_model)
        sigma, tokens = float(timestep.flatten()[0]), prod(grid(x.shape, patch))
        context, reference = self.stages.at_sigma(sigma, self.sigmas, tokens)
        index = self.variants.index((context > 0, reference > 0))
        cache = model_options.get("transformer_options", {}).get("easycache")  # EasyCache's or LazyCache's
        if index != self._current:
            self._current = index
            if hasattr(cache, "reset"):  # it compares with the condition that it saw first; a new stage has another
                cache.reset()
        all_conds = guider.conds
        chosen = {name: all_conds[_name(name, index)] for name in self.names}
        override = self._override(chosen, context, reference, x, patch, model_options)
        if override is not None:
            options = {**model_options.get("transformer_options", {}), "optimized_attention_override": override}
            model_options = {**model_options, "transformer_options": options}
        guider.conds = chosen
        try:
            out = executor(x, timestep, model_options, seed)
        finally:
            guider.conds = all_conds
        if override is not None and not override.applied and cache is None:
            raise RuntimeError(
                "Token strengths were asked for, but the model's attention never passed through ComfyUI's "
                f"optimized_attention_override ({type(diffusion_model).__name__}). Another extension replaces the "
                "attention; remove it, or use strengths that leave both groups at 1."
            )
        return out

    def _override(
        self, conds: dict, context: float, reference: float, x: Tensor, patch: int, model_options: dict
    ) -> KeyStrengthAttention | None:
        """The attention override of a call, or None where every key keeps its weight (the host's untouched path)."""
        if self.backbone is None:
            return None
        key = (context, reference, x.shape)
        if key not in self._overrides:
            strengths = {
                condition["uuid"]: _key_strengths(condition, self.backbone, context, reference, x.shape, patch)
                for conditions in conds.values()
                for condition in conditions
            }
            if all(s.changes_nothing for s in strengths.values()):
                strengths = {}
            previous = model_options.get("transformer_options", {}).get("optimized_attention_override")
            self._overrides[key] = KeyStrengthAttention(strengths, previous)
        override = self._overrides[key]
        return override if override.strengths else None


def _key_strengths(
    condition: Condition, backbone: Backbone, context: float, reference: float, shape: tuple[int, ...], patch: int
) -> KeyStrengths:
    """From a condition as the host prepared it, so that padding and cropping are already in."""
    inputs = condition["model_conds"]
    tokens = inputs["c_crossattn"].cond.shape[1] if "c_crossattn" in inputs else 0
    latents = inputs["ref_latents"].cond if "ref_latents" in inputs else []
    strengths, masks = strengths_and_masks(condition, len(latents))
    references = [
        reference_log_strength(latent.shape, patch, reference * strength, mask)
        for latent, strength, mask in zip(latents, strengths, masks)
    ]
    return key_strengths(backbone.token_order, tokens, context, _covered(condition, shape), patch, references)


def _name(name: str, variant: int) -> str:
    return name if variant == 0 else f"{name} stage {variant}"


def _covered(condition: Condition, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part of the noisy latent that the condition covers (its `area`: sizes, then offsets, in latent elements)."""
    if "area" not in condition:
        return tuple(shape)
    area = list(condition["area"])
    dims = len(area) // 2
    sizes = [min(area[i], shape[i - dims] - area[dims + i]) for i in range(dims)]
    return (*shape[: len(shape) - 2], *sizes[-2:])
