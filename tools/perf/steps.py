"""What a sampling step with the pack's patch costs beside the host's own: strengths 1/1 and between, regions.

    nox -s bench -- steps [--px 128] [--context 128] [--rounds 10] [--full]

Runs of one step through the host's KSampler and guiders, so that what begins and ends a run is counted, too: all forms
in one process, in turns, ratios round by round. By default one double block of FLUX.1 at full width in fp32 (and a
FLUX.1 of a few channels, whose step is nearly all overhead: `step_milliseconds_tiny`); with --full FLUX.1-dev and
FLUX.2 Klein 4B whole, random weights in bf16, at 1024 px with references of 1024 px and 512 context tokens. Last line:
one JSON object; its keys are FLUX.1's, those of Klein end in `_klein`.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from ...common.console import say
from ._measure import device_name, start, time_rounds

RATIOS = {  # key -> the step, and what it is compared with
    "step_overhead": ("patch 1/1", "host"),
    "step_overhead_guider": ("guider 1/1", "host"),
    "strength_overhead": ("between 0 and 1", "patch 1/1"),
    "region_overhead": ("regions", "two references"),
    "soft_region_overhead": ("soft regions", "two references"),
}


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- steps", description=__doc__.split("\n")[0])
    parser.add_argument("--px", type=int, help="side of the picture and its references")
    parser.add_argument("--context", type=int, help="MLLM tokens")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="whole models, on an accelerator")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # --full's code with tiny models
    options = parser.parse_args(argv)

    whole = options.full or options.tiny
    device = start(options.full, ["--highvram"] if options.full else [])
    import comfy.model_management

    from ...tests.small import dit
    from ._models import timed_dit

    result: dict[str, Any] = {"benchmark": "steps", "device": device_name(device), "rounds": options.rounds}
    result |= {"px": options.px or (1024 if options.full else 128)}
    result |= {"context_tokens": options.context or (512 if options.full else 128)}
    for family in ("flux", "flux2") if whole else ("flux",):
        model = timed_dit(family, options.full, options.tiny, device)
        found = measure(model, family, result["px"], result["context_tokens"], options.rounds, device)
        result |= found if family == "flux" else {f"{key}_klein": value for key, value in found.items()}
        say(f"{family}: {json.dumps(found)}")
        del model
        comfy.model_management.unload_all_models()
    if not whole:
        found = measure(dit.tiny("flux"), "flux", 64, 16, 100, device)["step_seconds"]
        result["step_milliseconds_tiny"] = {name: round(1e3 * seconds, 2) for name, seconds in found.items()}
    print(json.dumps(result))


def measure(model: Any, family: str, px: int, context: int, rounds: int, device: Any) -> dict[str, Any]:
    """Ratios, their quartiles, seconds and tokens of the steps of one model."""
    import torch

    from ...loaders.backbones import BACKBONES
    from ...loaders.conditioning import ReferenceSettings, add_references
    from ...loaders.dit import context_width
    from ...sampling.guider import staged_guider
    from ...sampling.patch import apply_stages
    from ...sampling.stages import Keyframe, Stages, preset

    backbone = BACKBONES[family]
    side = px // backbone.latent_downscale
    latents = [torch.randn(1, backbone.latent_channels, side, side) for _ in range(3)]
    left = (torch.arange(side) < side / 2).float().repeat(side, 1)
    seam = (1.5 - 2 * (torch.arange(side) + 0.5) / side).clamp(0, 1).repeat(side, 1)
    bare = [[torch.randn(1, context, context_width(model)), {"pooled_output": torch.randn(1, 768), "guidance": 3.5}]]

    def condition(*regions: Any) -> list:
        settings = [ReferenceSettings(region=region) for region in regions]
        return add_references(bare, latents[1 : 1 + len(regions)], settings, backbone.default_placement)

    one, two = condition(None), condition(None, None)
    both, between = apply_stages(model, preset("both")), apply_stages(model, Stages((Keyframe(1, 0.6, 0.5),)))
    forms = {
        "host": sampled(model, one, latents[0]),
        "patch 1/1": sampled(both, one, latents[0]),
        "guider 1/1": guided(model, staged_guider(model, preset("both"), one, None, 1.0), latents[0]),
        "between 0 and 1": sampled(between, one, latents[0]),
        "two references": sampled(both, two, latents[0]),
        "regions": sampled(both, condition(left, 1 - left), latents[0]),
        "soft regions": sampled(both, condition(seam, 1 - seam), latents[0]),
    }
    timed = time_rounds(forms, rounds, device)
    result: dict[str, Any] = {key: timed.ratio(*pair) for key, pair in RATIOS.items()}
    result |= {f"{key}_quartiles": timed.spread(*pair) for key, pair in RATIOS.items()}
    result["step_seconds"] = {name: round(timed.median(name), 4) for name in forms}
    if timed.peak:
        result["step_peak_bytes"] = timed.peak
    image = (px // backbone.token_side) ** 2
    return result | {"tokens": {"context": context, "image": image, "reference": image}}


def sampled(model: Any, positive: list, latent: Any) -> Callable[[], Any]:
    """A run of one step as KSampler starts it, without CFG."""
    import comfy.sample
    import torch

    image = torch.zeros_like(latent)
    arguments = (1, 1.0, "euler", "simple", positive, positive, image)
    return lambda: comfy.sample.sample(model, latent, *arguments, disable_pbar=True, seed=3)


def guided(model: Any, guider: Any, latent: Any) -> Callable[[], Any]:
    """The same as SamplerCustomAdvanced starts it."""
    import comfy.samplers
    import torch

    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 1)
    return lambda: guider.sample(latent, torch.zeros_like(latent), sampler, sigmas, disable_pbar=True, seed=3)
