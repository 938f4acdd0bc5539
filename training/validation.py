"""Held-out flow-matching loss, for each condition and each range of flow times."""

from __future__ import annotations

from math import sqrt
from statistics import fmean, stdev

import comfy.model_management
import torch

from .data.batches import STRATA, Batches
from .reporting.losses import Loss
from .step import TrainingStep

CONDITIONS = ("mllm", "vae", "both")
NAMES = tuple(
    f"t >= {low:g}" if high == 1 else f"{low:g} <= t < {high:g}" if low else f"t < {high:g}" for low, high in STRATA
)


@torch.no_grad()
def evaluate(module: TrainingStep, batches: Batches, count: int) -> list[Loss]:
    """Losses of the first `count` examples of `batches`, unweighted means with 95 % intervals. Flow times and noise are
    the same at every call and under every condition, so that rows may be compared."""
    passes = batches.held_out(count)  # encoded first: MLLM and DiT need not be on the device together
    module.backbone.load()
    found: dict[tuple[str, str], list[float]] = {(c, name): [] for c in CONDITIONS for name in NAMES}
    for index, held_out in enumerate(passes):
        for number, name in enumerate(NAMES):
            batch = batches.at_stratum(held_out, index, number)
            for condition in CONDITIONS:
                found[condition, name].append(float(module(batch.under(condition))))
                comfy.model_management.throw_exception_if_processing_interrupted()
    return [_interval(*key, values) for key, values in found.items()]


def _interval(condition: str, stage: str, values: list[float]) -> Loss:
    half = 1.96 * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return Loss(condition, stage, fmean(values), fmean(values) - half, fmean(values) + half, len(values))
