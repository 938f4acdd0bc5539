"""What several GPUs need for a training step: memory of each, and what each sends. Computed, as `memory` is.

data parallel       each has all that is trained; gradients are averaged once a step
sharded             each has its share of what is trained (see training.processes); it is gathered for every pass
all sharded         the frozen DiT too, gathered block by block: for comparison, this pack does not do it
"""

from collections.abc import Sequence
from itertools import product

from ...common.markdown import markdown
from ...loaders.backbones import BACKBONES, Backbone
from .memory import GIB, Estimate, blocks, estimate

WAYS = ("data parallel", "sharded", "all sharded")
FAMILIES = tuple(BACKBONES[name] for name in ("flux", "flux2", "qwen_image"))


def traffic(dla: int, lora: int, processes: int, *, sharded: bool, passes: int = 1, compute_bytes: int = 2) -> float:
    """Bytes that each process sends in a step, by rings: of n processes, each sends (n - 1) / n of what is gathered.

    Args:
        dla: Trained parameters of the DLA.
        lora: Of the LoRA.
        processes: Their number.
        sharded: Whether what is trained is sharded.
        passes: Whose gradients make one step.
        compute_bytes: Of a number in the DiT's arithmetic, in which a sharded LoRA is gathered.
    """
    share, gradients = (processes - 1) / processes, 4 * (dla + lora)
    if not sharded:
        return 2 * share * gradients  # averaging is a sum in parts, then a gathering of the parts
    return share * (passes * (4 * dla + compute_bytes * lora) + gradients)


def plan(backbone: Backbone, rank: int, processes: int, way: str, resolution: int = 512) -> tuple[float, float]:
    """Bytes at the peak of a step on each GPU, and bytes that each sends; bf16, AdamW, checkpointing, batch 1.

    Args:
        backbone: One of TRAINED.
        rank: Of the LoRA.
        processes: Their number.
        way: One of WAYS.
        resolution: Side of the target, px.
    """
    settings = dict(resolution=resolution, lora_rank=rank)
    alone = estimate(backbone, **settings)
    step = alone if way == "data parallel" else estimate(backbone, **settings, shards=processes)
    dla, lora = _trained(alone)
    sent = traffic(dla, lora, processes, sharded=way != "data parallel")
    if way != "all sharded" or processes == 1:
        return step.total, sent
    dit, share = step.parts["DiT weights"], (processes - 1) / processes
    kinds = blocks(backbone.training.sizes, 1, 1, 1, lora=True)
    # one block is used while the next one comes; every block twice: forward, and again for the backward pass
    two = 2 * 2 * max(block.weights() for block in kinds)
    return step.total - dit * share + two, sent + 2 * dit * share


def table(
    families: Sequence[Backbone] = FAMILIES, ranks: Sequence[int] = (64, 512), counts: Sequence[int] = (1, 2, 8, 64)
) -> str:
    """A markdown table: GiB on each GPU, and GB that each sends in a step, for each way of training."""
    rows = [("DiT", "LoRA", "trained", "GPUs", *WAYS)]
    for backbone, rank, count in product(families, ranks, counts):
        cells = (f"{memory / GIB:.0f} GiB, {sent / 1e9:.1f} GB" for memory, sent in _plans(backbone, rank, count))
        trained = f"{sum(_trained(estimate(backbone, resolution=512, lora_rank=rank))) / 1e9:.2f} B"
        rows.append((backbone.training.release, str(rank), trained, str(count), *cells))
    return markdown(rows)


def _plans(backbone: Backbone, rank: int, count: int) -> list[tuple[float, float]]:
    return [plan(backbone, rank, count, way) for way in WAYS]


def _trained(alone: Estimate) -> tuple[int, int]:
    """Trained parameters of DLA and LoRA, from the estimate of one process."""
    lora = alone.parts["LoRA"] // 4
    return alone.parts["gradients"] // 4 - lora, lora
