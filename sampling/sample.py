"""KSampler's job with a staged guider in the middle; noise, sigmas, preview and progress are the host's."""

import inspect

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview

from .guider import StagedGuider
from .stages import Stages


def staged_sample(
    model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive,
    negative,
    latent: dict,
    denoise: float,
    stages: Stages,
) -> dict:
    """LATENT in, LATENT out. denoise < 1 and `noise_mask` work as in KSampler: the last `steps` of a longer run."""
    guider = StagedGuider(model, stages)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = latent.copy()
    image = empty_latent_for(model, latent)
    sigmas = comfy.samplers.KSampler(
        model,
        steps=steps,
        device=model.load_device,
        sampler=sampler_name,
        scheduler=scheduler,
        denoise=denoise,
        model_options=model.model_options,
    ).sigmas
    samples = guider.sample(
        comfy.sample.prepare_noise(image, seed, latent.get("batch_index")),
        image,
        comfy.samplers.sampler_object(sampler_name),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, max(len(sigmas) - 1, 1)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    samples = samples.to(comfy.model_management.intermediate_device())
    if hasattr(comfy.model_management, "intermediate_dtype"):
        samples = samples.to(comfy.model_management.intermediate_dtype())
    return {**latent, "samples": samples}


def empty_latent_for(model, latent: dict):
    """The latent with the model's channels and downscale, as the host prepares it (later hosts take ratios)."""
    fix = comfy.sample.fix_empty_latent_channels
    ratios = [latent.pop(key, None) for key in ("downscale_ratio_spacial", "downscale_ratio_temporal")]
    takes = len(inspect.signature(fix).parameters) - 2
    return fix(model, latent["samples"], *ratios[: max(takes, 0)])
