"""AdamW, its parameter groups, and the learning rate at each step."""

import math

import torch
from torch import nn

from .dit.lora import LoRA
from .recipe import Recipe, RecipeError


def rate(recipe: Recipe, step: int) -> float:
    """Returns the factor on the learning rates at step number `step`, counted from 0; resuming needs no state."""
    options = recipe.training
    rise = min(1.0, (step + 1) / (options.warmup + 1))
    if options.schedule == "constant":
        return rise
    share = (step - options.warmup) / max(1, recipe.steps - options.warmup)
    return rise * (0.5 + 0.5 * math.cos(math.pi * min(max(share, 0.0), 1.0)))


def make_optimizer(recipe: Recipe, dla: nn.Module, lora: LoRA | None) -> torch.optim.Optimizer:
    """Makes AdamW over groups that keep their learning rate under "base".

    Raises RecipeError where there is nothing to train, or a package is missing.
    """
    options = recipe.training
    kinds: dict[str, list] = {"gate": [], "layers": [], "other": []}
    for name, parameter in dla.named_parameters():
        kind = name.split(".")[-2]
        kinds["gate" if kind in ("gate", "score") else kind if kind == "layers" else "other"].append(parameter)
    base = options.learning_rate
    groups = [
        {"params": kinds["other"], "base": base},
        {"params": kinds["gate"], "base": base * options.gate_rate, "weight_decay": 0.0},
        {"params": kinds["layers"], "base": base, "weight_decay": 0.0},
        {"params": lora.in_order() if lora is not None else [], "base": recipe.lora.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise RecipeError("Nothing is trained: dla.modalities is 'last' with equal widths and lora.rank is 0. Set one.")
    settings = {"lr": base, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        # fused needs no temporaries as large as the parameters
        return torch.optim.AdamW(groups, **settings, fused=groups[0]["params"][0].device.type == "cuda")
    try:
        import bitsandbytes
    except ImportError:
        raise RecipeError(
            f"training.optimizer is {options.optimizer!r}, which needs the package bitsandbytes, and it is not "
            "installed. Install it into ComfyUI's Python, or choose adamw."
        ) from None
    kind = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kind[options.optimizer](groups, **settings)
