"""The position of each token group among a DiT's attention keys, and the logarithm of its strength.

Groups: the context (MLLM or text tokens), the noisy image, and every reference latent by itself.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import ceil, inf, log, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grid(shape: tuple[int, ...], patch: int) -> tuple[int, int, int]:
    """Token grid (frames, rows, columns) of a latent (..., h, w), 4D or 5D; edges are padded to whole patches."""
    frames = shape[2] if len(shape) == 5 else 1
    return frames, ceil(shape[-2] / patch), ceil(shape[-1] / patch)


def patch_size(diffusion_model: Any) -> int:
    """Latent elements per token and side; 2 for models that do not say one number."""
    size = getattr(diffusion_model, "patch_size", 2)
    return size if isinstance(size, int) else 2


def log_strength(strength: float) -> float:
    """ln(strength), what is added to the logits; -inf for 0."""
    return log(strength) if strength > 0 else -inf


def reference_log_strength(shape: tuple[int, ...], patch: int, strength: float, mask: Tensor | None) -> Tensor:
    """(tokens,) float32 for one reference latent of `shape`; mask (h, w) in 0..1 over its picture, any size."""
    frames, rows, columns = grid(shape, patch)
    if mask is None:
        return torch.full((frames * rows * columns,), log_strength(strength))
    weight = F.interpolate(mask.float()[None, None], size=(rows, columns), mode="area").flatten()
    return (weight.clamp(0, 1) * strength).log().repeat(frames)  # log(0) = -inf: the token is removed


def key_strengths(
    order: Sequence[str], context: int, mllm: float, image_shape: tuple[int, ...], patch: int, references: list[Tensor]
) -> Tensor:
    """(keys,) float32: what to add to the logits of each key of a joint attention call; -inf removes it.

    Args:
        order: The family's order of the groups, see `Backbone.token_order`.
        context: Number of context tokens as the DiT sees them.
        mllm: Their strength.
        image_shape: Shape of the noisy latent, or of the area of it that the condition covers.
        patch: Latent elements per token and side.
        references: (tokens,) log strength of each reference latent.
    """
    groups = {
        "context": [torch.full((context,), log_strength(mllm))],
        "image": [torch.zeros(prod(grid(image_shape, patch)))],
        "reference": references,
    }
    return torch.cat([part for name in order for part in groups[name]])


def token_spans(
    order: Sequence[str], context: int, image_shape: tuple[int, ...], patch: int, references: Sequence[tuple[int, ...]]
) -> tuple[slice, slice, list[slice]]:
    """The context, the noisy image and each reference latent among the tokens of joint attention; see `key_strengths`.

    Args:
        order: As there.
        context: As there.
        image_shape: As there.
        patch: As there.
        references: Shape of each reference latent, (c, h, w) or (c, frames, h, w).
    """
    sizes = [prod(grid((1, *shape), patch)) for shape in references]
    groups = {"context": [context], "image": [prod(grid(image_shape, patch))], "reference": sizes}
    parts = [(name, count) for name in order for count in groups[name]]
    ends = pairwise(accumulate((count for _, count in parts), initial=0))
    spans = [(name, slice(*span)) for (name, _), span in zip(parts, ends)]
    context_span, image = (next(span for name, span in spans if name == group) for group in ("context", "image"))
    return context_span, image, [span for name, span in spans if name == "reference"]


def region_log_weight(
    region: Tensor, canvas: tuple[int, int], area: tuple[int, int, int, int], frames: int, patch: int
) -> Tensor:
    """(image tokens,) float32: ln of how much each image token reads a reference; -inf = not at all.

    Args:
        region: (h, w) in 0..1 over the canvas, any size.
        canvas: Height and width of the noisy latent, in latent elements.
        area: Height, width, top and left of what the model call covers of it, in latent elements.
        frames: Of the latent.
        patch: Latent elements per token and side.
    """
    height, width, top, left = area
    weight = F.interpolate(region.float()[None, None], size=canvas, mode="area").clamp(0, 1)
    weight = F.avg_pool2d(weight[..., top : top + height, left : left + width], patch, ceil_mode=True)
    return weight.flatten().log().repeat(frames)
