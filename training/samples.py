"""Sample pictures during a run: references, target, and what the present weights make of the prompt."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..common.drawing.sheet import contact_sheet, to_picture
from ..common.picture_files import load_picture
from ..dla.context import aggregate
from ..dla.features import Features
from ..loaders.conditioning import values_of
from ..sampling.sample import staged_sample
from ..sampling.stages import preset
from .data.batches import EMPTY, Batch, Batches
from .data.latent_cache import cut
from .recipe import Recipe
from .step import TrainingStep

PRESETS = {1: {"MLLM only": "mllm_only"}, 2: {"MLLM only": "mllm_only", "both": "both", "staged": "paper"}}


@torch.no_grad()
def sample_sheet(recipe: Recipe, module: TrainingStep, batches: Batches, vae: Any) -> Image.Image:
    """Samples the first examples of `batches` with the present weights and draws a row for each on one sheet."""
    options, seed = recipe.run, recipe.training.seed
    plans = batches.plan_held_out(options.samples)
    loaded = [batches.load(plan) for plan in plans]
    empty = batches.features.get(*EMPTY)
    rows = []
    for plan, batch in zip(plans, loaded):
        (index,) = plan.indices
        example = batches.examples[index]
        negative = _conditioning(module, batch, empty.features, empty.pooled)
        positive = _conditioning(module, batch, batch.features, batch.pooled)
        paths, (first, *others) = (*example.references, example.target), batches.sizes[index]
        pictures = [to_picture(cut(load_picture(path), *size)) for path, size in zip(paths, (*others, first))]
        titles = [*(f"reference {number}" for number in range(1, len(paths))), "target"]
        for title, name in PRESETS[recipe.training.stage].items():
            sampled = staged_sample(
                module.backbone.patcher, seed, options.sample_steps, options.sample_cfg, "euler",
                "simple", positive, negative, {"samples": torch.zeros_like(batch.clean)}, 1.0, preset(name),
            )  # fmt: skip
            pixels = vae.decode(sampled["samples"])
            pictures.append(to_picture(pixels.reshape(-1, *pixels.shape[-3:])[0]))
            titles.append(title)
        rows.append((example.prompt, pictures, titles))
    return contact_sheet(rows)


def _conditioning(module: TrainingStep, batch: Batch, features: Features, pooled: Tensor | None) -> list:
    """CONDITIONING, as Aggregate Layers and Add Identity would make it."""
    context, backbone = aggregate(features, module.dla, device=module.backbone.device), module.backbone
    values = values_of(
        context.attention_mask, backbone.family.counts_context, pooled=pooled, references=batch.references,
        method=module.method, guidance=module.training_options.guidance,
    )  # fmt: skip
    return [[context.tokens.cpu(), values]]
