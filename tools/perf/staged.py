"""A run on the paper's schedule over the same run with both token groups throughout: measured, and by operations.

    nox -s bench -- staged [--rounds 1] [--full]

Both runs go through the host's sampler, without CFG, in turns. By default one double block of FLUX.1 at full width, at
a sixteenth of the tokens; with --full FLUX.1-dev and FLUX.2 Klein 4B whole, random weights in bf16, at 1024 px with
one reference of 1024 px, 512 and 2,048 MLLM tokens, and 20 steps. Last line: one JSON object; `staged_over_both` is
FLUX.1's at 512 (scaled: 32) tokens, `..._2048` at 2,048 (128), those of Klein end in `_klein`, and `..._predicted` is
what linear maps and attention say of the steps' token counts.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...common.console import say
from ._measure import device_name, start, time_rounds
from .costs import count_step, kinds_of_steps


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- staged", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="whole models, on an accelerator")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # --full's code with tiny models
    options = parser.parse_args(argv)

    whole = options.full or options.tiny
    device = start(options.full, ["--highvram"] if options.full else [])
    import comfy.model_management

    from ...loaders.backbones import BACKBONES
    from ._models import timed_dit

    px, contexts, steps = (1024, (512, 2048), 20) if options.full else (256, (32, 128), 6)
    result: dict[str, Any] = {"benchmark": "staged", "device": device_name(device), "px": px, "steps": steps}
    for family in ("flux", "flux2") if whole else ("flux",):
        backbone, model = BACKBONES[family], timed_dit(family, options.full, options.tiny, device)
        counted = backbone.training.sizes
        counted = counted if whole else replace(counted, blocks=1, single=0)
        for context, suffix in zip(contexts, ("", "_2048")):
            found = measure(model, backbone, counted, px, context, steps, options.rounds, device)
            say(f"{family}, {context} MLLM tokens: {json.dumps(found)}")
            suffix += "" if family == "flux" else "_klein"
            result[f"staged_over_both{suffix}"] = found.pop("ratio")
            result[f"staged_over_both{suffix}_predicted"] = found.pop("predicted")
            result[f"staged_runs{suffix}"] = found
        del model
        comfy.model_management.unload_all_models()
    print(json.dumps(result))


def measure(
    model: Any, backbone: Any, sizes: Any, px: int, context: int, steps: int, rounds: int, device: Any
) -> dict[str, Any]:
    """Ratio of the two runs, measured and predicted, with steps, tokens and operations by kind of step."""
    import comfy.sample
    import comfy.samplers
    import torch

    from ...loaders.conditioning import ReferenceSettings, add_references
    from ...loaders.dit import context_width
    from ...sampling.patch import apply_stages
    from ...sampling.stages import preset

    side = px // backbone.latent_downscale
    latent, reference = (torch.randn(1, backbone.latent_channels, side, side) for _ in range(2))
    bare = [[torch.randn(1, context, context_width(model)), {"pooled_output": torch.randn(1, 768), "guidance": 3.5}]]
    condition = add_references(bare, [reference], [ReferenceSettings()], backbone.default_placement)

    def run(staged: Any) -> Callable[[], Any]:
        arguments = (steps, 1.0, "euler", "simple", condition, condition, torch.zeros_like(latent))
        return lambda: comfy.sample.sample(staged, latent, *arguments, disable_pbar=True, seed=3)

    forms = {name: run(apply_stages(model, preset(name))) for name in ("both", "paper")}
    timed = time_rounds(forms, rounds, device)

    image = (px // backbone.token_side) ** 2
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps).tolist()
    kinds = kinds_of_steps(preset("paper"), sigmas, image)
    tokens, operations = count_step(backbone, context, px, 1, px, sizes)
    predicted = sum(operations[kind] * number for kind, number in kinds.items()) / (operations["both"] * steps)
    return {
        "ratio": timed.ratio("paper", "both"),
        "predicted": round(predicted, 4),
        "steps": kinds,
        "tokens": tokens,
        "step_tflop": {kind: round(count / 1e12, 4) for kind, count in operations.items()},
        "seconds": {name: round(timed.median(name), 3) for name in forms},
        "peak_bytes": timed.peak,
    }
