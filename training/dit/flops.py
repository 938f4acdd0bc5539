"""The arithmetic of a training pass, and what it says of passes per hour. Computed from the models' structure.

Counted are the linear maps of the blocks and their attention, in the DiT alone: forward, backward to the activations
(weights are frozen) and, with checkpointing, forward again. A LoRA's own maps, norms, casts, the DLA, MLLM and VAE are
left out. Passes per hour are in proportion to its inverse where two DiTs use a device equally well.
"""

from itertools import accumulate
from typing import Any

from ...common.markdown import markdown
from ...loaders.backbones import TRAINED, Backbone, DiTSizes
from .memory import GIB, blocks, first_that_fits, in_words, steps_of, token_counts

FLASH_BACKWARD = 5 / 2  # of attention's forward pass: five matrix products in place of two, scores computed again


def forward(
    backbone: Backbone,
    *,
    sizes: DiTSizes | None = None,
    resolution: int = 512,
    references: int = 1,
    reference_side: int = 512,
    context_tokens: int = 512,
) -> tuple[float, float]:
    """Floating point operations of one call of the DiT without gradients: of its linear maps, of its attention.

    Args:
        backbone: One of TRAINED.
        sizes: Of the DiT; None = of the family's release.
        resolution: Side of the target, a square, px.
        references: Their number.
        reference_side: Of each, squares, px.
        context_tokens: Prompt and image tokens of the MLLM.
    """
    dit = sizes or backbone.training.sizes
    image, reference = token_counts(backbone, (resolution, resolution), references, reference_side)
    linear, attention = 0.0, 0.0
    for block in blocks(dit, context_tokens, image, reference, lora=True):
        pieces = [block.tokens]
        if dit.pieces:
            pieces = [context_tokens, *[reference // max(references, 1)] * references, image]
        maps = sum(i * o for i, o in block.attention + block.mlp)  # those that one token meets
        linear += block.count * 2 * maps * block.tokens
        pairs = sum(queries * keys for queries, keys in zip(pieces, accumulate(pieces)))
        attention += block.count * 4 * pairs * dit.width
    return linear, attention


def flops(backbone: Backbone, *, checkpointing: bool = True, **settings: Any) -> float:
    """Floating point operations of a training pass of one example through the DiT.

    Args:
        backbone: One of TRAINED.
        checkpointing: Whether blocks are computed again in the backward pass.
        **settings: As for `forward`.
    """
    linear, attention = forward(backbone, **settings)
    again = int(checkpointing)
    return linear * (2 + again) + attention * (1 + FLASH_BACKWARD + again)


def compare(card: int = 24, rank: int = 128, resolution: int = 512) -> str:
    """A markdown table: what each family takes on one card, with the settings nearest to full precision that fit it.

    Args:
        card: Its nominal memory, GB.
        rank: Of the LoRA.
        resolution: Side of the target, px.
    """
    first, baseline = TRAINED[0].training.release, 0.0
    rows = [("DiT", "MLLM", f"settings on {card} GB", "GiB", "TFLOP a pass", f"passes per hour, {first} = 1")]
    for backbone in TRAINED:
        steps, mllm = steps_of(backbone, resolution, rank), backbone.training.mllm
        settings = first_that_fits(steps, card)
        cells = "no", "-", "-", "-"
        if settings is not None:
            count, step = flops(backbone, resolution=resolution, checkpointing=settings[2]), steps[settings]
            baseline = baseline or count
            words = in_words(settings, step, mllm, card)
            cells = words, f"{step.total / GIB:.0f}", f"{count / 1e12:.0f}", f"{baseline / count:.1f}"
        rows.append((backbone.training.release, mllm.name, *cells))
    return markdown(rows)
