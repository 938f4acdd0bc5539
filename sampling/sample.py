"""KSampler with a staged guider in the middle; noise, sigmas, preview and progress are the host's."""

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview

from ..loaders.host import fit_latent, to_intermediate
from ..loaders.protocols import Model
from .guider import staged_guider
from .stages import Stages


def staged_sample(
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list,
    negative: list | None,
    latent: dict,
    denoise: float,
    stages: Stages,
) -> dict:
    """KSampler's job under a schedule: LATENT in, LATENT out; `denoise` and `noise_mask` work as there."""
    guider = staged_guider(model, stages, positive, negative, cfg)
    image = fit_latent(model, latent)
    device, options = model.load_device, model.model_options
    sigmas = comfy.samplers.KSampler(model, steps, device, sampler_name, scheduler, denoise, options).sigmas
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
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**kept, "samples": to_intermediate(samples)}
