"""Classifier-free guidance over the references with a scale of its own: a patch on MODEL, beside or without stages.

    none + s (text - none) + g (full - text)

full = the positive condition, text = the positive without its references, none = the negative without references,
s = the guider's CFG scale, g = the image scale. g = s is ordinary CFG between full and none; s = 1 needs no negative.

Source: InstructPix2Pix (arXiv 2211.09800, equation 3) guides by none, image, image and text; OmniGen2's pipeline does
the same with the negative prompt. Here the text comes first, our choice: it is the same sum over the other factors,
p(text) p(references | text), and gives models that are sampled without a negative an image scale for one evaluation.
"""

import logging
from functools import partial
from math import isfinite
from typing import Any
from uuid import uuid4

import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ..loaders.conditioning import Condition, reference_latents, stage_variant
from .conditions import check_family
from .other_patches import OURS
from .patch import OUTER_SAMPLE, PREDICT_NOISE, put_outermost, wrappers_of

KEY = f"{OURS}image_guidance"  # of the wrappers
TEXT = "positive without references"  # name of the added condition
CALC, PRE_CFG = "sampler_calc_cond_batch_function", "sampler_pre_cfg_function"  # the host's options

log = logging.getLogger(__name__)


def apply_image_guidance(model: Any, scale: float) -> Any:
    """A clone of a MODEL whose references have a guidance scale of their own, with the host's samplers and CFG.

    Args:
        model: The host's MODEL; it is not changed.
        scale: Image scale g, in the place of one that the model has; 0 is the picture without references, 1 adds what
            they change once.
    """
    if not isfinite(scale):
        raise ValueError(f"Image Guidance: its scale is {scale}, expected a finite number.")
    check_family(model, changes=True)
    clone = model.clone()
    # outside the stages, which then stage the added condition like any other
    put_outermost(clone.model_options, OUTER_SAMPLE, KEY, partial(_outer_sample, scale))
    return clone


def _outer_sample(scale: float, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Wrapper of the guider's `outer_sample`: conditions and functions are of this run alone."""
    guider = executor.class_obj
    conds = guider.conds
    if "positive" not in conds:
        raise ValueError(_not_the_hosts_cfg(guider))

    def without_references(condition: Condition) -> Condition:
        return stage_variant(condition, context=True, reference=False, backbone=None)

    conds[TEXT] = [
        {**without_references(c), "uuid": uuid4(), "prompt_type": c.get("prompt_type", "positive")}
        for c in conds["positive"]
    ]
    if any(reference_latents(c) for c in conds.get("negative", ())):
        log.info("Image Guidance: the references of the negative condition are left out.")
        conds["negative"] = [without_references(c) for c in conds["negative"]]
    options = guider.model_options
    guider.model_options = new = comfy.model_patcher.create_model_options_clone(options)
    run = GuidedRun(scale, guider, new.get(CALC))
    new[CALC], new[PRE_CFG] = run.calc_cond_batch, [run.combine, *new.get(PRE_CFG, ())]
    # inside all others, which may leave out a step
    wrappers_of(new, PREDICT_NOISE)[KEY] = [run.predict_noise]
    try:
        out = executor(*args, **kwargs)
    finally:
        guider.model_options = options
    if not run.acted:
        log.warning(
            "Image Guidance had no effect in this run, since no reference latent did: the positive condition has none, "
            "the stage schedule leaves them out, or this model does not read them."
        )
    return out


class GuidedRun:
    """State of one run: predicts the third condition beside the host's two, and adds it to the host's CFG.

    Args:
        scale: Image scale g.
        guider: The run's.
        others: The `sampler_calc_cond_batch_function` that the model has already, or None.
    """

    def __init__(self, scale: float, guider: Any, others: Any):
        self.scale, self.guider, self.others = scale, guider, others
        self.acted = False  # references changed a prediction
        self._reached = False  # in this call
        self._text: Tensor | None = None  # prediction of this call

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Wrapper of the guider's `predict_noise`. Raises RuntimeError where that is not the host's CFG."""
        self._reached = False
        out = executor(*args, **kwargs)
        if not self._reached:
            raise RuntimeError(_not_the_hosts_cfg(self.guider))
        return out

    def calc_cond_batch(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The host's `sampler_calc_cond_batch_function`: predicts positive and negative, and text with them."""
        conds, model, options = arguments["conds"], arguments["model"], arguments["model_options"]
        x, sigma = arguments["input"], arguments["sigma"]
        self._reached = conds[0] is self.guider.conds["positive"]
        referenced = any(reference_latents(condition) for condition in conds[0] or ())
        alone = self.scale == 1 and conds[1] is None  # text + (full - text)
        self.acted |= referenced and alone
        texts = [self.guider.conds[TEXT]] if referenced and not alone else []
        if self.others is None:
            out = comfy.samplers.calc_cond_batch(model, [*conds, *texts], x, sigma, options)
        else:  # takes two
            out = [*self.others(arguments)]
            out += comfy.samplers.calc_cond_batch(model, texts, x, sigma, options) if texts else []
        self._text = out[2] if texts else None
        return out[:2]

    def combine(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The first `sampler_pre_cfg_function`: a positive prediction by which the host's CFG comes to the formula."""
        out, text, cfg = arguments["conds_out"], self._text, arguments["cond_scale"]
        if text is None:
            return out
        self._text, (full, none) = None, out
        self.acted = self.acted or not torch.equal(full, text)
        if cfg == self.scale:
            return out
        if cfg == 0:  # the host's result is the negative prediction
            return [full, none + self.scale * (full - text)]
        return [text + self.scale / cfg * (full - text), none]


def _not_the_hosts_cfg(guider: Any) -> str:
    return (
        f"Image Guidance: {type(guider).__name__} does not predict its positive and negative by ComfyUI's own CFG "
        "(sampling_function), so that the image scale would have no effect. Use KSampler, CFGGuider, BasicGuider or "
        "Staged Guider. DualCFGGuider has an image scale of its own: cond1 = the prompt with references, cond2 = the "
        "negative prompt with references, cfg_cond2_negative = the scale; remove Image Guidance there."
    )
