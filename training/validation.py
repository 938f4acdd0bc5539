"""Held-out flow-matching loss, for each condition and each bin of flow times."""

import comfy.model_management
import torch

from .data.batches import BINS, Batches
from .flow import FlowTimes
from .processes import Processes
from .reporting.losses import CONDITIONS, Loss
from .step import TrainingStep

NAMES = tuple(
    f"t >= {low:g}" if high == 1 else f"{low:g} <= t < {high:g}" if low else f"t < {high:g}" for low, high in BINS
)


@torch.no_grad()
def evaluate(module: TrainingStep, batches: Batches, count: int, processes: Processes) -> list[Loss]:
    """Returns the unweighted losses of the first `count` examples: means with Student's t intervals (95 %).

    Flow times and noise are the same at every call and under every condition, so that rows can be compared, and in
    whichever of the processes, among which the examples are divided. All of its examples are encoded first: MLLM and
    DiT need not be on the device together.
    """
    plans = list(enumerate(batches.plan_held_out(count)))[processes.rank :: processes.count]
    loaded = [(index, batches.load(plan)) for index, plan in plans]
    module.backbone.load()
    own: list[tuple[int, dict[tuple[str, str], float]]] = []
    for index, held_out in loaded:
        values = {}
        for number, name in enumerate(NAMES):
            batch = batches.at_bin(held_out, index, number)
            for condition in CONDITIONS:
                # `forward`: a call of sharded modules would wait for the other processes
                values[condition, name] = float(module.forward(batch.under(condition)))
                comfy.model_management.throw_exception_if_processing_interrupted()
        own.append((index, values))
    found = [values for _, values in sorted(processes.collect(own), key=lambda entry: entry[0])]
    return [Loss.of(c, name, [values[c, name] for values in found]) for c in CONDITIONS for name in NAMES]


def frequencies(shares: dict[str, float], times: FlowTimes) -> dict[tuple[str, str], float]:
    """Returns for each condition and bin the share of the training passes that have both, from each one's `shares`."""
    t = times(torch.linspace(0, 1, 10_001))
    often = [float(((t >= low) & (t < high)).float().mean()) for low, high in BINS]
    return {(c, name): share * f for c, share in shares.items() for name, f in zip(NAMES, often)}
