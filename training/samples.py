"""Pictures of a run as it goes: references, target, and what the weights of the moment make of the prompt."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..common.drawing.sheet import contact_sheet, to_picture
from ..common.picture_files import load_picture
from ..dla.context import aggregate
from ..loaders.conditioning import values_of
from ..sampling.sample import staged_sample
from ..sampling.stages import preset
from .data.batches import EMPTY, Batch
from .data.latent_cache import cut

PRESETS = {1: {"MLLM only": "mllm_only"}, 2: {"MLLM only": "mllm_only", "both": "both", "staged": "paper"}}


@torch.no_grad()
def sample_sheet(run) -> Image.Image:
    """One row for each of the first held-out examples (or training examples, where none are held out)."""
    options, batches = run.recipe.run, run.held_out or run.batches
    passes = batches.held_out(options.samples)
    empty = batches.features.get(*EMPTY)
    rows = []
    for index, (example, batch) in enumerate(zip(batches.examples, passes)):
        negative = _conditioning(run, batch, empty.features, empty.pooled)
        positive = _conditioning(run, batch, batch.features, batch.pooled)
        paths, (first, *others) = (*example.references, example.target), batches.sizes[index]
        pictures = [to_picture(cut(load_picture(path), *size)) for path, size in zip(paths, (*others, first))]
        titles = [*(f"reference {number}" for number in range(1, len(paths))), "target"]
        for title, name in PRESETS[run.recipe.training.stage].items():
            sampled = staged_sample(
                run.backbone.patcher, run.recipe.training.seed, options.sample_steps, options.sample_cfg, "euler",
                "simple", positive, negative, {"samples": torch.zeros_like(batch.clean)}, 1.0, preset(name),
            )  # fmt: skip
            pictures.append(_decode(run, sampled["samples"]))
            titles.append(title)
        rows.append((example.prompt, pictures, titles))
    return contact_sheet(rows)


def _conditioning(run, batch: Batch, features, pooled: Tensor | None) -> list:
    """CONDITIONING, as Aggregate Layers and Add Identity would make it."""
    context, options = aggregate(features, run.dla, device=run.backbone.device), run.recipe.training
    values = values_of(
        context.attention_mask, run.backbone.family.counts_context, pooled=pooled, references=batch.references,
        method=run.method, guidance=options.guidance,
    )  # fmt: skip
    return [[context.tokens.cpu(), values]]


def _decode(run, latent: Tensor) -> Image.Image:
    pixels = run.parts.vae.decode(latent)
    return to_picture(pixels.reshape(-1, *pixels.shape[-3:])[0])
