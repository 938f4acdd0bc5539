"""KSampler with a staged guider in the middle, and a run's noise levels; all of it by the host."""

from types import SimpleNamespace
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview

from ..common.prompt_graph import Graph
from ..loaders.host import fit_latent, to_intermediate
from ..loaders.protocols import Model
from .guider import staged_guider
from .queued_run import QueuedRun, queued_run_of_inputs
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
    guider = staged_guider(model, stages, positive, negative, cfg, "Staged Sampler")
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


def flow_sampling(shift: float, multiplier: float | None = None) -> Any:
    """What the host makes of a flow-matching model's settings: its noise levels.

    Args:
        shift: Of the noise levels.
        multiplier: From flow time to the timestep of models that have one (Qwen-Image, SD3); None = as FLUX.
    """
    if multiplier is None:
        levels = comfy.model_sampling.ModelSamplingFlux()
        levels.set_parameters(shift=shift)
    else:
        levels = comfy.model_sampling.ModelSamplingDiscreteFlow()
        levels.set_parameters(shift=shift, multiplier=multiplier)
    return levels


def run_sigmas(model_sampling: Any, run: QueuedRun) -> list[float]:
    """The noise levels, n + 1 for n steps, that the host's samplers make of these settings."""
    model = SimpleNamespace(get_model_object=lambda name: model_sampling)
    sampler = comfy.samplers.KSampler(model, run.steps, "cpu", run.sampler, run.scheduler, run.denoise)
    return sampler.sigmas[run.first : run.last + 1].tolist()


def sigmas_of_graph(model: Model, graph: Graph, node: str) -> list[float]:
    """The noise levels of the sampler that a Stage Preview's model or schedule is connected to.

    Raises ValueError where there is none, or its settings come out of other nodes.
    """
    run = queued_run_of_inputs(graph, node, "model", "stages")
    if run is None:
        raise ValueError(
            "Stage Preview: no sampler whose steps and scheduler are typed is connected to its model or its schedule. "
            "Connect one, or a scheduler node to the input sigmas."
        )
    return run_sigmas(model.get_model_object("model_sampling"), run)
