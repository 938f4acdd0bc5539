"""The position of each token group among a DiT's attention keys, and the logarithm of its strength.

Groups: the context (MLLM or text tokens), the noisy image, and every reference latent by itself.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil, inf, log, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loaders.backbones import Backbone, Part


def grid(shape: tuple[int, ...], patch: int) -> tuple[int, int, int]:
    """Token grid (frames, rows, columns) of a latent (..., h, w), 4D or 5D; edges are padded to whole patches."""
    frames = shape[2] if len(shape) == 5 else 1
    return frames, ceil(shape[-2] / patch), ceil(shape[-1] / patch)


def patch_size(diffusion_model: Any, backbone: Backbone | None) -> int:
    """Latent elements per token and side; 2 for models of no known family that do not say one number."""
    if backbone is not None:
        return backbone.patch_size
    size = getattr(diffusion_model, "patch_size", 2)
    return size if isinstance(size, int) else 2


def log_strength(strength: float) -> float:
    """ln(strength), what is added to the logits; -inf for 0."""
    return log(strength) if strength > 0 else -inf


def reference_shapes(shapes: Mapping[str, Any]) -> Sequence[tuple[int, ...]]:
    """Of the reference latents among those of a model's inputs, (c, h, w) or (c, frames, h, w)."""
    return shapes.get("ref_latents") or shapes.get("ref_frames") or ()


def token_parts(
    backbone: Backbone, module: Any, context: int, image_shape: tuple[int, ...], shapes: Mapping[str, Any]
) -> list[Part]:
    """The tokens of a joint attention call, in order.

    Args:
        backbone: The family's record.
        module: The DiT.
        context: Number of context tokens that the model is called with.
        image_shape: Shape of the noisy latent, or of the area of it that the condition covers.
        shapes: Of the model's other inputs, tensors and lists of them, without their batch, by the host's names. Lists
            of numbers are as they are.
    """
    patch = backbone.patch_size
    image, references = grid(image_shape, patch), [grid((1, *s), patch) for s in reference_shapes(shapes)]
    if backbone.token_parts is not None:
        return backbone.token_parts(module, context, image, references, shapes)
    groups = {
        "context": [Part("context", context, joint_only=True)],
        "image": [Part("image", prod(image), image)],
        "reference": [Part("reference", prod(size), size, index) for index, size in enumerate(references)],
    }
    return [part for name in backbone.token_order for part in groups[name]]


def recounted(parts: Sequence[Part], tokens: Sequence[int]) -> list[Part]:
    """The same with the references' numbers of tokens as the host counts them, where these are whole frames."""

    def one(part: Part) -> Part:
        frames, rest = divmod(tokens[part.reference], part.grid[1] * part.grid[2])
        return part if rest else part._replace(tokens=tokens[part.reference], grid=(frames, *part.grid[1:]))

    return [one(part) if part.group == "reference" and not part.joint_only else part for part in parts]


def with_added(parts: Sequence[Part], before: int, behind: int) -> list[Part]:
    """The same with so many tokens, which have no strengths, before and behind the context."""
    at = next(index for index, part in enumerate(parts) if part.group == "context")
    return [*parts[:at], Part("other", before), parts[at], Part("other", behind), *parts[at + 1 :]]


def spans(parts: Sequence[Part]) -> list[slice]:
    """Where each part lies among the tokens."""
    return [slice(*ends) for ends in pairwise(accumulate((part.tokens for part in parts), initial=0))]


def reference_log_strength(part: Part, strength: float, mask: Tensor | None) -> Tensor:
    """(tokens,) float32 for one reference; mask (h, w) in 0..1 over its picture, any size, not of its padding."""
    frames, rows, columns = part.grid
    logs = torch.full((part.tokens,), log_strength(strength))
    if mask is not None:
        weight = F.interpolate(mask.float()[None, None], size=(rows, columns), mode="area").flatten()
        # log(0) = -inf: the token is removed
        logs[: frames * rows * columns] = (weight.clamp(0, 1) * strength).log().repeat(frames)
    return logs


def key_strengths(parts: Sequence[Part], mllm: float, references: Sequence[tuple[float, Tensor | None]]) -> Tensor:
    """(keys,) float32: what to add to the logits of each key of a joint attention call; -inf removes it.

    Args:
        parts: The call's tokens.
        mllm: Strength of the context.
        references: Strength and mask of each reference.
    """
    logs = {
        "context": lambda part: torch.full((part.tokens,), log_strength(mllm)),
        "reference": lambda part: reference_log_strength(part, *references[part.reference]),
    }
    return torch.cat([logs[part.group](part) if part.group in logs else torch.zeros(part.tokens) for part in parts])


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
